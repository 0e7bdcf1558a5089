"""E feed-forward networks as stacked weights, and the plain MLP that serves as dense layer and as shared
expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import (
    DispatchPlan,
    ExpertWeights,
    check_activation,
    dense_mlp,
    expert_mlp,
    is_gated,
)
from gatewright.kernels.activations import activate
from gatewright.kernels.rows import owners
from gatewright.parts.draws import call_key, fold, uniform_rows
from gatewright.parts.dropout import check_dropout, dropped
from gatewright.parts.routing import RoutingCall

# Expert dropout draws from a key of its own, so that it has nothing to do with the router's noise.
_DROPOUT = 0x64726F70


def fan_in_normal(weight: Float[Tensor, "..."], scale: float = 1.0) -> None:
    """Return nothing: draw a weight from a normal of std sqrt(scale / fan_in), truncated at 2 std."""
    std = (scale / weight.shape[-1]) ** 0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def check_init_scale(scale: float) -> float:
    """Return `scale` if a variance can be multiplied with it; raise UserError otherwise."""
    if not scale > 0:
        raise UserError(f"init_scale {scale}; allowed: above 0; it is a share of the usual variance")
    return scale


class MLP(nn.Module):
    """A dense feed-forward layer, [..., D] -> [..., D]; `w_in` [F or 2F, D] (gate first), `w_down` [D, F],
    and with `bias` `b_in` [F or 2F] and `b_down` [D].

    Equation: FFN(x) = w_down act(w_in x + b_in) + b_down.
    Args: `init_scale` s draws weights of variance s / fan_in (Switch section 2.4: 0.1); `dropout` is the
    share of activated hidden numbers that training sets to 0, by the call's key.
    """

    takes_key = True

    def __init__(
        self,
        width: int,
        ffn_width: int,
        activation: str = "swiglu",
        *,
        bias: bool = False,
        init_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(width, ffn_width) < 1:
            raise UserError(f"width {width}, ffn_width {ffn_width}; allowed: 1 or more of each")
        self.dropout = check_dropout(dropout)
        self.activation = check_activation(activation)
        self.init_scale = check_init_scale(init_scale)
        self.w_in = nn.Parameter(torch.empty(ffn_width * (2 if is_gated(activation) else 1), width))
        self.w_down = nn.Parameter(torch.empty(width, ffn_width))
        self.b_in = nn.Parameter(torch.empty(self.w_in.shape[0])) if bias else None
        self.b_down = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights from a normal of std sqrt(init_scale / fan_in), truncated at 2 std; biases are
        0.
        """
        fan_in_normal(self.w_in, self.init_scale)
        fan_in_normal(self.w_down, self.init_scale)
        for bias in (self.b_in, self.b_down):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self, x: Float[Tensor, "*batch D"], *, key: Int64[Tensor, ""] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """Return FFN(x), shape and dtype of x; `key` fixes the dropout of this call."""
        if self.training and self.dropout:
            hidden = activate(self.activation, F.linear(x, self.w_in, self.b_in))
            return F.linear(dropped(hidden, self.dropout, key), self.w_down, self.b_down)
        return dense_mlp(x, self.w_in, self.w_down, self.activation, self.b_in, self.b_down)


class Experts(nn.Module):
    """E expert feed-forward networks, stacked: `w_gate_up` [E, 2F, D] or `w_up` [E, F, D], and `w_down`
    [E, D, F]; with `bias` also `b_gate_up` [E, 2F] or `b_up` [E, F], and `b_down` [E, D].

    Args: `dropout` is the share of activated hidden numbers that training sets to 0, the others being
    divided by 1 - dropout (Switch section 2.4: 0.4 in fine-tuning); which ones is a pure function of the
    call's key, the token's place and the expert, so recomputation and the order of rows do not matter.
    `init_scale` s draws weights of variance s / fan_in (Switch: 0.1).
    Raises: UserError for a dropout outside 0..1 or a scale that is not above 0.
    """

    takes_key = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        expert_width: int,
        activation: str = "swiglu",
        *,
        bias: bool = False,
        dropout: float = 0.0,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"expert_dropout {dropout}; allowed: 0 or more and below 1; 0 is none")
        self.width, self.num_experts, self.dropout = width, num_experts, dropout
        self.activation = check_activation(activation)
        self.gated = is_gated(activation)
        self.init_scale = check_init_scale(init_scale)
        rows = expert_width * (2 if self.gated else 1)
        self._first = "gate_up" if self.gated else "up"
        self.register_parameter(f"w_{self._first}", nn.Parameter(torch.empty(num_experts, rows, width)))
        self.w_down = nn.Parameter(torch.empty(num_experts, width, expert_width))
        b_in = nn.Parameter(torch.empty(num_experts, rows)) if bias else None
        self.register_parameter(f"b_{self._first}", b_in)
        self.b_down = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.reset_parameters()

    @property
    def w_in(self) -> nn.Parameter:
        """The first matrix, by either name."""
        return self.get_parameter(f"w_{self._first}")

    @property
    def b_in(self) -> nn.Parameter | None:
        """The first bias, by either name."""
        return None if self.b_down is None else self.get_parameter(f"b_{self._first}")

    def reset_parameters(self) -> None:
        """Draw both weights from a normal of std sqrt(init_scale / fan_in), truncated at 2 std; biases are
        0.
        """
        fan_in_normal(self.w_in, self.init_scale)
        fan_in_normal(self.w_down, self.init_scale)
        for bias in (self.b_in, self.b_down):
            if bias is not None:
                nn.init.zeros_(bias)

    def weights(self) -> ExpertWeights:
        """Return the stacked weights."""
        return ExpertWeights(self.w_in, self.w_down, self.activation, self.b_in, self.b_down)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        plan: DispatchPlan,
        combine_weights: Float[Tensor, "T K"],
        backend: str | None = None,
        *,
        key: Int64[Tensor, ""] | None = None,
    ) -> Float[Tensor, "T D"]:
        """Return y [T, D] for x [T, D]: each token's experts, combined with its weights [T, K].

        Args: `key` fixes the dropout of this call; None draws one from torch's own generator.
        """
        weights = self.weights()
        scale = self._hidden_scale(x, plan, key) if self.training and self.dropout else None
        return expert_mlp(x, plan, combine_weights, weights, backend, scale)

    def _hidden_scale(self, x: Tensor, plan: DispatchPlan, key: Tensor | None) -> Tensor:
        """Return what dropout multiplies the hidden rows with, [M, F]: 0 or 1 / (1 - dropout)."""
        own = fold(call_key(RoutingCall(key=key), x.device), _DROPOUT)
        rows = plan.token_ids * self.num_experts + owners(plan)
        stays = uniform_rows(own, rows, self.w_down.shape[-1]) >= self.dropout
        return stays.to(x.dtype) / (1 - self.dropout)
