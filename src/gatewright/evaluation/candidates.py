"""Which of a few answers a decoder finds likeliest after a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.evaluation.undropped import for_generation
from gatewright.parts import MoELayer


class Score(NamedTuple):
    """`accuracy`, the share of texts whose likeliest candidate is the right one; `nats`, the mean of -ln of
    the right one's share of all candidates' probability.
    """

    accuracy: float
    nats: float


@torch.no_grad()
def candidate_scores(
    model: Decoder,
    prompts: Int64[Tensor, "N P"],
    candidates: Sequence[Sequence[int]],
    batch_size: int = 64,
) -> Float[Tensor, "N C"]:
    """Return ln p(candidate | prompt) = sum_j ln p(c_j | prompt, c_1 .. c_{j-1}), fp64.

    Each prompt is read once, each candidate behind it from the cache. Nothing is dropped, so that no text's
    score depends on those that it is read with; the model is left in the mode that it was found in.
    """
    layers = [own for own in model.modules() if isinstance(own, MoELayer)]
    length, longest = prompts.shape[1], max(len(ids) for ids in candidates)
    found = torch.empty(len(prompts), len(candidates), dtype=torch.float64)
    with for_generation(model, layers):
        for start in range(0, len(prompts), batch_size):
            rows = prompts[start : start + batch_size]
            cache = model.new_cache(len(rows), length + longest)
            logits = model(rows, cache, with_stats=False, only_last=True).logits[:, -1]
            first = logits.double().log_softmax(-1)
            for place, ids in enumerate(candidates):
                total, own = first[:, ids[0]], torch.as_tensor(ids, device=rows.device)
                if len(ids) > 1:
                    given, follow = (part.expand(len(rows), -1) for part in (own[:-1], own[1:]))
                    later = model(given, cache, with_stats=False).logits.double().log_softmax(-1)
                    total = total + later.gather(-1, follow[..., None]).sum((1, 2))
                    cache.cut(length)
                found[start : start + len(rows), place] = total
    return found


def score_of(scores: Float[Tensor, "N C"], right: Int64[Tensor, "N"]) -> Score:
    """Return accuracy and nats; a tie goes to the first candidate."""
    chosen = scores.argmax(-1)
    share = scores.log_softmax(-1).gather(-1, right[:, None])
    return Score(float((chosen == right).double().mean()), float(-share.mean()))
