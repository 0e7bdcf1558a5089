"""Loss-Free Balancing: experts are chosen by score plus a bias that learns from their loads; no loss."""

from __future__ import annotations

from typing import Any

import torch

from gatewright.errors import UserError
from gatewright.parts.router import Router
from gatewright.parts.rules.group_limited import make_group_limited
from gatewright.parts.rules.registry import RouterInfo, register

# What the paper trains with: its sigmoid models, and its comparison with softmax scores.
_BIAS_RULE_OF = {"sigmoid": "sign", "softmax": "proportional"}


def make_loss_free(
    width: int,
    num_experts: int,
    num_selected: int,
    dtype: torch.dtype = torch.float32,
    *,
    scores: str = "sigmoid",
    rate: float = 1e-3,
    bias_rule: str | None = None,
    normalised: bool = True,
    **options: Any,
) -> Router:
    """Return a router that chooses by s_i + b_i and weighs by s_i.

    Equation: Loss-Free Balancing eq 3 and algorithm 1: g_i = s_i where s_i + b_i is among the K highest,
    else 0. Raw scores are the paper's weights; `weights="renormalised"` is DeepSeek-V3's form.
    Args: `scores` "sigmoid" or "softmax"; `rate` u, `normalised` and `stop_after` as in SelectionBias;
    `bias_rule` None is the one that the paper uses with these scores ("sign", "proportional"). `options` are
    GroupLimited's.
    Raises: UserError for other scores.
    Differs: `normalised` is True here, so that the proportional rule does not depend on the batch.
    """
    if scores not in _BIAS_RULE_OF:
        raise UserError(
            f"scores {scores!r} for a router without losses; allowed: {', '.join(_BIAS_RULE_OF)}; for other "
            "scores build a Router with GroupLimited and a SelectionBias"
        )
    return make_group_limited(
        width,
        num_experts,
        num_selected,
        dtype,
        scores=scores,
        rate=rate,
        bias_rule=_BIAS_RULE_OF[scores] if bias_rule is None else bias_rule,
        normalised=normalised,
        **options,
    )


register(
    RouterInfo(
        name="loss_free",
        scores="sigmoid (or softmax)",
        selection="by score + learned bias: each token its K best experts",
        weights="unbiased scores, raw",
        capacity="none",
        losses=(),
        causal=True,
        used_by="Loss-Free Balancing 1B, 3B",
        source="Loss-Free Balancing eq 3, algorithm 1",
        make=make_loss_free,
    )
)
