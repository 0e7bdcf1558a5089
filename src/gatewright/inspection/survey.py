"""One pass of a model over texts: where the tokens of each domain go, as an inspection's result holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .capture import Captured, Pieces, capture_routing, window_starts
from .metrics import chance, coactivation_counts, coactivation_shares

if TYPE_CHECKING:
    from torch import nn

LARGEST_MATRIX = 128  # experts up to which a result holds who is selected with whom in full
STRONGEST = 12  # pairs that it names beside
LEAST = 10  # tokens that an expert has to have for its pairs to be named


@dataclass(frozen=True)
class Window:
    """What was seen of consecutive tokens: `start` is the place of the first in its domain's tokens, `routed`
    the choices of each router for them.
    """

    domain: str
    start: int
    ids: np.ndarray
    pieces: list[str]
    routed: Mapping[str, Captured]


@dataclass
class _Tally:
    """Sums over all tokens that one router has routed."""

    num_experts: int
    num_selected: int
    counts: np.ndarray
    together: np.ndarray
    by_domain: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, domain: str, experts: np.ndarray) -> None:
        """Count the choices [T, K] of one window."""
        self.counts += np.bincount(experts[experts >= 0], minlength=self.num_experts)
        together = coactivation_counts(experts, self.num_experts)
        self.together += together
        self.by_domain[domain] = self.by_domain.get(domain, 0) + together.diagonal()


def survey(
    model: nn.Module,
    tokens_by_domain: Mapping[str, Any],
    tokenizer: Pieces,
    *,
    context: int,
    batch_size: int = 4,
    most_tokens: int = 4096,
    start: Sequence[int] = (),
    shown: int = 640,
    on_window: Callable[[Window], None] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Return loads, dead experts, co-activation, specialisation and coloured texts of a model's routers.

    Args: at most `most_tokens` of each domain are counted, in windows of `context` spread evenly over it;
        `start` ids (a beginning of text) stand before each window and enter nothing; the first `shown` tokens
        of each domain are shown; `on_window` is called for every window that is counted, in order.
    Returns: {"inspected", "specialisation", "token_view", "routers"}: plain numbers, ready for JSON.
    Raises: UserError when a domain holds no token, the context has no room, or the model no router.
    """
    width = context - len(start)
    if width < 1:
        raise UserError(f"context {context}; allowed: {len(start) + 1} or more; give --context")
    tallies: dict[str, _Tally] = {}
    read: dict[str, int] = {}
    views = []
    for number, (domain, tokens) in enumerate(tokens_by_domain.items()):
        flat = np.asarray(tokens, dtype=np.int64).reshape(-1)
        if not len(flat):
            raise UserError(f"domain {domain} holds no token; allowed: 1 or more; leave the domain out")
        own = min(width, len(flat))
        counted = window_starts(len(flat), own, most_tokens)
        first = np.arange(0, max(min(shown, len(flat) - own + 1), 1), own)
        view = _View(domain, shown)
        places = [*counted.tolist(), *(place for place in first.tolist() if place not in counted)]
        for done, (place, routed) in enumerate(_windows(model, flat, places, own, start, batch_size)):
            ids = flat[place : place + own]
            window = Window(domain, place, ids, tokenizer.pieces(ids), routed)
            view.add(window)
            if place not in counted:
                continue
            _count(tallies, window)
            read[domain] = read.get(domain, 0) + len(ids)
            if on_window is not None:
                on_window(window)
            if progress is not None:
                share = (number + (done + 1) / len(places)) / len(tokens_by_domain)
                progress(share, f"{sum(read.values()):,} tokens, {domain}")
        views.append(view.record())
    return {
        "routers": list(tallies),
        "inspected": _inspected(tallies, read),
        "specialisation": _specialisation(tallies, read),
        "token_view": views,
    }


def _windows(
    model: nn.Module, flat: np.ndarray, places: list[int], width: int, start: Sequence[int], batch_size: int
) -> Iterator[tuple[int, dict[str, Captured]]]:
    """Yield each window's place and the choices for its tokens, those of the start ids cut off."""
    before = np.asarray(start, dtype=np.int64)
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        rows = np.stack([np.concatenate([before, flat[place : place + width]]) for place in batch])
        routed = capture_routing(model, rows)
        for row, place in enumerate(batch):
            begin = row * rows.shape[1] + len(before)
            own = slice(begin, begin + width)
            yield (
                place,
                {
                    name: Captured(one.num_experts, one.experts[own], one.weights[own], one.scores[own])
                    for name, one in routed.items()
                },
            )


def _count(tallies: dict[str, _Tally], window: Window) -> None:
    for name, one in window.routed.items():
        if name not in tallies:
            size = one.num_experts
            zeros = np.zeros(size, dtype=np.int64)
            tallies[name] = _Tally(size, one.num_selected, zeros, np.zeros((size, size)))
        tallies[name].add(window.domain, one.experts.numpy())


class _View:
    """The first tokens of a domain with their experts and weights, from whichever windows they come."""

    def __init__(self, domain: str, shown: int) -> None:
        self.domain, self.shown = domain, shown
        self.windows: dict[int, Window] = {}

    def add(self, window: Window) -> None:
        if window.start < self.shown:
            self.windows[window.start] = window

    def record(self) -> dict[str, Any]:
        """Return the text as `token_view` does."""
        pieces: list[str] = []
        routers: dict[str, dict[str, list[Any]]] = {}
        for place in sorted(self.windows):
            window = self.windows[place]
            left = self.shown - len(pieces)
            if place != len(pieces) or left < 1:
                break
            pieces += window.pieces[:left]
            for name, one in window.routed.items():
                block = routers.setdefault(name, {"experts": [], "weights": []})
                block["experts"] += one.experts[:left].tolist()
                block["weights"] += np.round(one.weights[:left].double().numpy(), 4).tolist()
        return {"domain": self.domain, "pieces": pieces, "routers": routers}


def _inspected(tallies: Mapping[str, _Tally], read: Mapping[str, int]) -> dict[str, Any]:
    """Return what was counted, by router."""
    shares = {name: coactivation_shares(tally.together) for name, tally in tallies.items()}
    return {
        "tokens": sum(read.values()),
        "domain_tokens": dict(read),
        "num_experts": {name: tally.num_experts for name, tally in tallies.items()},
        "num_selected": {name: tally.num_selected for name, tally in tallies.items()},
        "counts": {name: tally.counts.tolist() for name, tally in tallies.items()},
        "coactivation": {
            name: share.round(4).tolist() if len(share) <= LARGEST_MATRIX else None
            for name, share in shares.items()
        },
        "pairs": {name: strongest_pairs(tally.together) for name, tally in tallies.items()},
    }


def strongest_pairs(together: np.ndarray, most: int = STRONGEST, least: int = LEAST) -> list[list[Any]]:
    """Return [i, j, share of i's tokens that select j too] of the strongest pairs of `coactivation_counts`;
    experts i of fewer than `least` tokens are left out, as of few tokens every share is large.
    """
    shares = np.where(together.diagonal()[:, None] >= least, coactivation_shares(together), 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:most]
    found = [(int(place // len(shares)), int(place % len(shares))) for place in order]
    return [[i, j, round(float(shares[i, j]), 4)] for i, j in found if shares[i, j] > 0]


def _specialisation(tallies: Mapping[str, _Tally], read: Mapping[str, int]) -> dict[str, Any]:
    """Return the block that `capture.specialisation` gives, of the counts at hand."""
    chances = {name: chance(tally.num_experts, tally.num_selected) for name, tally in tallies.items()}
    return {
        "domains": list(read),
        "chance": next(iter(chances.values()), None),
        "num_selected": next((tally.num_selected for tally in tallies.values()), None),
        "chances": chances,
        "routers": {
            name: [(tally.by_domain[domain] / read[domain]).round(6).tolist() for domain in read]
            for name, tally in tallies.items()
        },
    }
