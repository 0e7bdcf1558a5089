"""E feed-forward networks as stacked weights, and the plain MLP that serves as dense layer and as shared
expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import DispatchPlan, ExpertWeights, activate, check_activation, expert_mlp, is_gated


def _fan_in_normal(weight: Tensor) -> None:
    std = weight.shape[-1] ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class MLP(nn.Module):
    """A dense feed-forward layer without biases, [..., D] -> [..., D]; `w_in` [F or 2F, D] (gate first),
    `w_down` [D, F].

    Equation: FFN(x) = w_down act(w_in x).
    """

    def __init__(self, width: int, ffn_width: int, activation: str = "swiglu") -> None:
        super().__init__()
        if min(width, ffn_width) < 1:
            raise UserError(f"width {width}, ffn_width {ffn_width}; allowed: 1 or more of each")
        self.activation = check_activation(activation)
        self.w_in = nn.Parameter(torch.empty(ffn_width * (2 if is_gated(activation) else 1), width))
        self.w_down = nn.Parameter(torch.empty(width, ffn_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights from a normal of std fan_in ** -0.5, truncated at 2 std."""
        _fan_in_normal(self.w_in)
        _fan_in_normal(self.w_down)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return FFN(x), shape and dtype of x."""
        return F.linear(activate(self.activation, F.linear(x, self.w_in)), self.w_down)


class Experts(nn.Module):
    """E expert feed-forward networks, stacked: `w_gate_up` [E, 2F, D] or `w_up` [E, F, D], and `w_down`
    [E, D, F].
    """

    def __init__(self, width: int, num_experts: int, expert_width: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.gated = is_gated(activation)
        w_in = nn.Parameter(torch.empty(num_experts, expert_width * (2 if self.gated else 1), width))
        self.register_parameter("w_gate_up" if self.gated else "w_up", w_in)
        self.w_down = nn.Parameter(torch.empty(num_experts, width, expert_width))
        self.reset_parameters()

    @property
    def w_in(self) -> nn.Parameter:
        """The first matrix, by either name."""
        return self.get_parameter("w_gate_up" if self.gated else "w_up")

    def reset_parameters(self) -> None:
        """Draw both weights from a normal of std fan_in ** -0.5, truncated at 2 std."""
        _fan_in_normal(self.w_in)
        _fan_in_normal(self.w_down)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        plan: DispatchPlan,
        combine_weights: Float[Tensor, "T K"],
        backend: str | None = None,
    ) -> Float[Tensor, "T D"]:
        """Return y [T, D] for x [T, D]: each token's experts, combined with its weights [T, K]."""
        weights = ExpertWeights(self.w_in.to(x.dtype), self.w_down.to(x.dtype), self.activation)
        return expert_mlp(x, plan, combine_weights, weights, backend)
