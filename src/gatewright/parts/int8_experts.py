"""Experts in int8, for reading alone: a quarter of fp32's bytes for each token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import DispatchPlan, ExpertWeights, expert_mlp, quantise
from gatewright.parts.experts import Experts


class Int8Experts(nn.Module):
    """The experts of an `Experts` with matrices in int8 and one fp32 scale per output row, biases in fp32:
    forward without gradient. `kernels.int8` states the bounds of what that changes.

    It lives in memory only: it has no state to save, and says so to who asks. Up to 8 tokens are computed
    from the int8 numbers themselves, more from weights that are multiplied out for the call.
    """

    takes_key = False

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.width, self.num_experts, self.activation = experts.width, experts.num_experts, experts.activation
        for name in ("in", "down"):
            held, scale = quantise(getattr(experts, f"w_{name}"))
            self.register_buffer(f"w_{name}", held)
            self.register_buffer(f"scale_{name}", scale)
            bias = getattr(experts, f"b_{name}")
            self.register_buffer(f"b_{name}", None if bias is None else bias.detach().float())
        self.register_state_dict_pre_hook(_refuse_to_save)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Scales and biases stay in fp32 when a model is turned into another dtype."""
        floats = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in floats.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def weights(self) -> ExpertWeights:
        """Return the stacked int8 weights with their scales."""
        held = self._buffers
        matrices = (held["w_in"], held["w_down"])
        rest = (held["b_in"], held["b_down"], held["scale_in"], held["scale_down"])
        return ExpertWeights(*matrices, self.activation, *rest)  # type: ignore[arg-type]

    def forward(
        self,
        x: Float[Tensor, "T D"],
        plan: DispatchPlan,
        combine_weights: Float[Tensor, "T K"],
        backend: str | None = None,
    ) -> Float[Tensor, "T D"]:
        """Return y [T, D] as `Experts` does, within the bounds. Raises: UserError where a gradient is due."""
        if torch.is_grad_enabled() and (x.requires_grad or combine_weights.requires_grad):
            raise UserError(
                "int8 experts with a gradient; allowed: torch.no_grad() or inference; train the model before "
                "its experts are quantised"
            )
        return expert_mlp(x, plan, combine_weights, self.weights(), backend)


def _refuse_to_save(module: nn.Module, *_: Any) -> None:
    raise UserError(
        "int8 experts have no state to save; allowed: in memory only; save the model before its experts are "
        "quantised"
    )
