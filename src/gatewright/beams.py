"""Write targets with an encoder-decoder: beam search with length normalisation; one beam is greedy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatewright.backbones import PairModel
from gatewright.errors import RunFailure, UserError
from gatewright.generation import for_generation
from gatewright.parts import MoELayer


class Written(NamedTuple):
    """One target: its ids without start and end, its log-probability in nats, and what it is ranked by."""

    ids: list[int]
    log_probability: float
    score: float


@dataclass(frozen=True)
class BeamSearch:
    """How targets are looked for: `beams` at a time, `alpha` 0 ranks by probability alone, `max_length` ids
    at most, the end included.
    """

    beams: int = 4
    alpha: float = 0.6
    max_length: int = 128

    def __post_init__(self) -> None:
        if self.beams < 1 or self.max_length < 1:
            raise UserError(f"beams {self.beams}, max_length {self.max_length}; allowed: 1 or more of each")
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise UserError(f"alpha {self.alpha}; allowed: 0 (no length normalisation) or more")


def length_penalty(length: int, alpha: float) -> float:
    """Return what a log-probability of `length` ids is divided by.

    Equation: lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha (Wu et al. 2016, eq 14); the end counts as an id.
    """
    return ((5 + length) / 6) ** alpha


def beam_search(
    model: PairModel,
    source: Tensor,
    *,
    start: int,
    end: int,
    source_mask: Tensor | None = None,
    search: BeamSearch | None = None,
) -> list[list[Written]]:
    """Return for each source [B, P] int64 up to `beams` targets, the best one first.

    In each step the `beams` most likely continuations of what is open are kept, the lower place first among
    equals; one that ends is finished and leaves its place, so that one beam is greedy decoding. At
    `max_length` what is open counts as finished. Experts drop nothing. A source's targets do not depend on
    the other rows.
    Raises: UserError for ids that the model lacks; RunFailure where logits are not finite.
    """
    search = search or BeamSearch()
    for name, i in (("start", start), ("end", end)):
        if not 0 <= i < model.vocab_size:
            raise UserError(f"{name} id {i}; allowed: 0 to {model.vocab_size - 1}; give the model's own")
    if source.dim() != 2 or source.dtype != torch.int64 or not source.numel():
        raise UserError(f"source {source.dtype} {list(source.shape)}; allowed: torch.int64 [B, P]; encode it")
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    with torch.inference_mode(), for_generation(model, layers):
        return _Beams(model, source, source_mask, start, end, search).run()


class _Beams:
    """The open targets of a batch, `beams` rows for each source, and those that are finished."""

    def __init__(
        self,
        model: PairModel,
        source: Tensor,
        mask: Tensor | None,
        start: int,
        end: int,
        search: BeamSearch,
    ) -> None:
        self.end, self.search = end, search
        # Any: each kind of model takes the cache that it makes.
        self.model: Any = model
        self.count, device = source.shape[0], source.device
        encoded = model.encode(source, mask, with_stats=False)
        self.cache = model.new_cache(encoded, search.max_length)
        first = torch.arange(self.count, device=device).repeat_interleave(search.beams)
        self.cache.take(first)
        self.ids = torch.full((len(first), 1), start, dtype=torch.int64, device=device)
        # Only the first row of each source is open: the others would say the same.
        self.values = torch.full((self.count, search.beams), -torch.inf, dtype=torch.float64, device=device)
        self.values[:, 0] = 0
        self.finished: list[list[Written]] = [[] for _ in range(self.count)]

    def run(self) -> list[list[Written]]:
        """Extend until nothing open can be among the best."""
        for length in range(1, self.search.max_length + 1):
            self._extend()
            self._finish(length)
            if not bool((self.values > -torch.inf).any()):
                break
        return self.finished

    def _extend(self) -> None:
        """Replace the open targets by their most likely continuations."""
        beams = self.search.beams
        output = self.model.decode(self.ids[:, -1:], self.cache, with_stats=False, only_last=True)
        steps = output.logits[:, -1].double().log_softmax(-1).view(self.count, beams, -1)
        if not bool(torch.isfinite(output.logits).all()):
            raise RunFailure("the model's logits are not finite; the search stops; check the checkpoint")
        totals = (self.values.unsqueeze(-1) + steps).flatten(1)
        best, places = torch.sort(totals, dim=-1, descending=True, stable=True)
        self.values, places = best[:, :beams].clone(), places[:, :beams]
        if self.values.shape[1] < beams:  # a vocabulary smaller than the beams
            short = (0, beams - self.values.shape[1])
            self.values = torch.nn.functional.pad(self.values, short, value=-torch.inf)
            places = torch.nn.functional.pad(places, short)
        size = steps.shape[-1]
        offsets = torch.arange(self.count, device=places.device).unsqueeze(-1) * beams
        rows = (places // size + offsets).flatten()
        self.cache.take(rows)
        self.ids = torch.cat([self.ids[rows], (places % size).view(-1, 1)], dim=1)

    def _finish(self, length: int) -> None:
        """Take out what has ended, and what cannot be among a source's best any more."""
        search, beams = self.search, self.search.beams
        over = length == search.max_length
        values, ids = self.values.tolist(), self.ids.view(self.count, beams, -1).tolist()
        longest = length_penalty(search.max_length, search.alpha)
        for s in range(self.count):
            own = self.finished[s]
            for b in range(beams):
                value = values[s][b]
                ended = ids[s][b][-1] == self.end
                if value == -math.inf or not (ended or over):
                    continue
                text = ids[s][b][1:-1] if ended else ids[s][b][1:]
                own.append(Written(text, value, value / length_penalty(length, search.alpha)))
                self.values[s, b] = -torch.inf
            own.sort(key=lambda one: -one.score)
            del own[beams:]
            # No longer target is better than at the greatest length, and every id costs probability.
            if len(own) == beams and own[-1].score >= float(self.values[s].max()) / longest:
                self.values[s] = -torch.inf
