"""Where a model sends tokens: captured choices, and the blocks of a result that the report shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import UserError
from .metrics import chance, selected

if TYPE_CHECKING:
    from torch import Tensor, nn


class Pieces(Protocol):
    """The part of a tokenizer that a view needs."""

    eot: int

    def pieces(self, ids: Any) -> list[str]: ...


@dataclass(frozen=True)
class Captured:
    """One router's choices for T tokens, on the CPU, without gradient.

    `experts` [T, K] int64: first choice first, -1 where the assignment was dropped. `weights` [T, K]: what
    multiplies each expert's output. `scores` [T, K]: the router's probability of each chosen expert, before
    any renormalisation.
    """

    num_experts: int
    experts: Tensor
    weights: Tensor
    scores: Tensor

    @property
    def num_selected(self) -> int:
        """K."""
        return self.experts.shape[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode without gradients; give each its former flag back."""
    import torch

    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def capture_routing(model: nn.Module, tokens: Any) -> dict[str, Captured]:
    """Return each router's choices on `tokens` [B, S], in row-major order (T = B * S), by router name.

    The model is called once as `model(tokens, capture=True)`, in evaluation mode and without gradient; of an
    encoder-decoder that is its encoder, which reads the text whole.
    Raises: UserError when the model has no router or does not record the choices.
    """
    import torch

    device = next(model.parameters()).device
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=device)
    with evaluating(model):
        stats = getattr(model, "encode", model)(ids, capture=True).stats
    found: dict[str, Captured] = {}
    for name, record in stats.items():
        if record.experts is None or record.combine_weights is None or record.scores is None:
            raise UserError(
                f"router {name} recorded no choices; allowed: rules that give a token its experts; "
                "capture a token-choice router"
            )
        scores = record.scores.gather(1, record.experts.clamp(min=0))
        found[name] = Captured(
            num_experts=record.num_experts,
            experts=record.experts.detach().cpu(),
            weights=record.combine_weights.detach().float().cpu(),
            scores=scores.detach().float().cpu(),
        )
    if not found:
        raise UserError("the model has no router; allowed: models with a sparse layer; give the sparse side")
    return found


def window_starts(length: int, context: int, most: int) -> np.ndarray:
    """Return where windows of `context` tokens begin: at most `most` tokens of a text of `length`, spread
    evenly over it, the first at its start. A text that is shorter is one window.
    """
    count = max(length // context, 1)
    kept = max(1, min(count, most // context))
    return np.linspace(0, count - 1, kept).round().astype(np.int64) * context


def _windows(tokens: np.ndarray, context: int, most: int) -> np.ndarray:
    """Return at most `most` tokens as windows [n, context] spread evenly; a short text is one window."""
    flat = np.asarray(tokens, dtype=np.int64).reshape(-1)
    starts = window_starts(len(flat), context, most)
    return flat[starts[:, None] + np.arange(min(context, len(flat)))]


def specialisation(
    model: nn.Module,
    tokens_by_domain: Mapping[str, Any],
    *,
    context: int,
    batch_size: int = 16,
    most_tokens: int = 65_536,
) -> dict[str, Any]:
    """Return the domain specialisation of every router, as a result file holds it.

    Equation: share of the tokens of domain D that have expert E_i among their K selected
        (`domain_specialisation`); an assignment dropped at capacity does not count.
    Args: tokens_by_domain: 1-d token ids of each domain; at most `most_tokens` of each are read, in windows
        of `context` spread evenly over it, `batch_size` windows at a time.
    Returns: {"domains", "chance", "num_selected", "chances": {router: K/E}, "routers": {router: [D][E]}};
        `chance` and `num_selected` are those of the first router. Plain numbers, ready for JSON.
    Raises: UserError when a domain holds no token or the model no router.
    """
    shares: dict[str, list[list[float]]] = {}
    chances: dict[str, float] = {}
    first_width = 0
    for domain, tokens in tokens_by_domain.items():
        windows = _windows(tokens, context, most_tokens)
        if not windows.size:
            raise UserError(f"domain {domain} holds no token; allowed: 1 or more; leave the domain out")
        totals: dict[str, np.ndarray] = {}
        for start in range(0, len(windows), batch_size):
            for name, routed in capture_routing(model, windows[start : start + batch_size]).items():
                hits = selected(routed.experts, routed.num_experts).sum(axis=0)
                totals[name] = totals.get(name, 0) + hits
                chances[name] = chance(routed.num_experts, routed.num_selected)
                first_width = first_width or routed.num_selected
        for name, hits in totals.items():
            shares.setdefault(name, []).append((hits / windows.size).round(6).tolist())
    return {
        "domains": list(tokens_by_domain),
        "chance": next(iter(chances.values()), None),
        "num_selected": first_width or None,
        "chances": chances,
        "routers": shares,
    }


def token_view(
    model: nn.Module,
    tokens: Any,
    pieces: Sequence[str],
    *,
    domain: str,
    context: int,
) -> dict[str, Any]:
    """Return one text with the experts and weights of every token, as a result file holds it.

    Args: tokens: 1-d ids, best a few hundred; pieces: one printable piece per id. A text longer than
        `context` is read in windows, each without the one before it.
    Returns: {"domain", "pieces", "routers": {router: {"experts": [[K]...], "weights": [[K]...]}}}.
    Raises: UserError for no token, or another number of pieces than of tokens.
    """
    flat = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if not len(flat) or len(pieces) != len(flat):
        raise UserError(
            f"{len(pieces)} pieces for {len(flat)} tokens; allowed: one each, 1 or more; "
            "pass tokenizer.pieces(tokens)"
        )
    routers: dict[str, dict[str, list[Any]]] = {}
    for start in range(0, len(flat), context):
        for name, routed in capture_routing(model, flat[None, start : start + context]).items():
            block = routers.setdefault(name, {"experts": [], "weights": []})
            block["experts"] += routed.experts.tolist()
            block["weights"] += np.round(routed.weights.double().numpy(), 4).tolist()
    return {"domain": domain, "pieces": [str(piece) for piece in pieces], "routers": routers}


def token_views(
    model: nn.Module,
    tokens_by_domain: Mapping[str, Any],
    tokenizer: Pieces,
    *,
    context: int,
    length: int = 640,
) -> list[dict[str, Any]]:
    """Return a `token_view` of each domain's first `length` tokens, ends of text at the start left out."""
    views = []
    for domain, tokens in tokens_by_domain.items():
        flat = np.asarray(tokens, dtype=np.int64).reshape(-1)
        start = int(np.argmax(flat != tokenizer.eot)) if len(flat) else 0
        shown = flat[start : start + length]
        if len(shown):
            views.append(token_view(model, shown, tokenizer.pieces(shown), domain=domain, context=context))
    return views
