"""How the experts of a transformers model hold their weights, as this toolkit's stacked weights.

transformers marks each class of experts with five flags; what they mean here:

| flag | `gate_up_proj` (or `up_proj`) | `down_proj` | what it costs |
|---|---|---|---|
| none | [E, 2F, D], gate first | [E, D, F] | nothing, it is our layout |
| `is_transposed` | [E, D, 2F] | [E, F, D] | nothing, a view |
| `is_concatenated=False` | gate and up in turn | | a copy of the first matrix per call |
| `has_gate=False` | `up_proj` [E, F, D] | | nothing |
| `has_bias` | and biases [E, 2F], [E, D] | | nothing |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import ExpertWeights

# A module with the flags above, and with the weights that they promise.
TheirExperts = Any
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What ACT2FN holds, and what a class may set in its place.
_SILU = ("transformers.activations.SiLUActivation", "torch.nn.modules.activation.SiLU", F.silu)
_GELU = ("transformers.activations.GELUActivation", "torch.nn.modules.activation.GELU", F.gelu)
_RELU = ("torch.nn.modules.activation.ReLU", F.relu)
# Classes whose own gate is (up + 1) g sigmoid(alpha g) between cuts, and the numbers that ours has.
_CLAMPED = (
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts",
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts",
    "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts",
)
_ALPHA, _LIMIT = 1.702, 7.0


class Weights(NamedTuple):
    """w_in [E, H, D], w_down [E, D, F], and where there are any b_in [E, H] and b_down [E, D]."""

    w_in: Tensor
    w_down: Tensor
    b_in: Tensor | None
    b_down: Tensor | None


def activation_of(experts: TheirExperts) -> str | None:
    """Return the name of this toolkit's activation that the experts compute; None where it has none of
    theirs, so that they have to compute it themselves.
    """
    if experts.has_post_expert_norm:
        return None
    act = getattr(experts, "act_fn", None)
    if not experts.has_gate:
        return "relu" if _is(act, _RELU) else "gelu" if _is(act, _GELU) else None
    if type(experts)._apply_gate.__name__ == "_default_apply_gate":
        return "swiglu" if _is(act, _SILU) else "geglu" if _is(act, _GELU) else None
    kind = f"{type(experts).__module__}.{type(experts).__name__}"
    alpha = getattr(experts, "alpha", getattr(experts, "swiglu_alpha", None))
    same = alpha == _ALPHA and getattr(experts, "limit", None) == _LIMIT
    return "clamped_swiglu" if same and kind in _CLAMPED else None


def _is(act: Any, names: tuple[Any, ...]) -> bool:
    """Return whether an activation is one of these functions, or of one of these classes."""
    if isinstance(act, nn.Module):
        exact = getattr(act, "approximate", "none") == "none"
        return exact and f"{type(act).__module__}.{type(act).__name__}" in names
    return any(act is function for function in names)


def copies_weights(experts: TheirExperts) -> bool:
    """Return whether `stacked_weights` has to copy the first matrix: where gate and up stand in turn."""
    return bool(experts.has_gate and not experts.is_concatenated)


def _halves(mixed: Tensor) -> Tensor:
    """Return a copy with the gate half first of a last axis where gate and up stand in turn."""
    return torch.cat([mixed[..., ::2], mixed[..., 1::2]], dim=-1)


def their_weights(experts: TheirExperts) -> Weights:
    """Return the weights as views of the shapes that `ExpertWeights` has, H in the experts' own order. Reads
    each parameter once: an adapter computes it anew each time.

    Raises: UserError where they are quantised.
    """
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    w_in, w_down = getattr(experts, first), experts.down_proj
    if w_in.dtype not in DTYPES:
        raise UserError(
            f"{type(experts).__name__} holds {first} as {w_in.dtype}; allowed: "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}; load the model "
            "unquantised, or keep its own experts implementation"
        )
    if experts.is_transposed:
        w_in, w_down = w_in.mT, w_down.mT
    if not experts.has_bias:
        return Weights(w_in, w_down, None, None)
    return Weights(w_in, w_down, getattr(experts, f"{first}_bias"), experts.down_proj_bias)


def stacked_weights(experts: TheirExperts, theirs: Weights, activation: str) -> ExpertWeights:
    """Return the weights in this toolkit's layout: views, but where `copies_weights` the first matrix and
    bias, which are copies through which gradients reach the parameters.
    """
    w_in, w_down, b_in, b_down = theirs
    if copies_weights(experts):
        w_in = _halves(w_in.mT).mT
        b_in = None if b_in is None else _halves(b_in)
    return ExpertWeights(w_in, w_down, activation, b_in, b_down)
