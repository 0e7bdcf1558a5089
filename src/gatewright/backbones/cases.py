"""Models of cases instead of texts: a mixture whose experts and gate see the input, and one net with a hidden
layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.parts import LinearExperts, Router
from gatewright.parts.linear_experts import check_squash, squash
from gatewright.parts.rules import build_router


class MixtureOutput(NamedTuple):
    """T cases: each expert's `outputs`, the gate's `logits`, and the `blend` that the gate makes of them."""

    outputs: Float[Tensor, "T E C"]
    logits: Float[Tensor, "T E"]
    blend: Float[Tensor, "T C"]


class Mixture(nn.Module):
    """A gate and E experts on one input: x [T, D] -> MixtureOutput. The error functions are made of the
    experts' outputs one by one; only what is answered is blended.

    Equation: y = sum_e p_e o_e, p = softmax(W_r x + b_r) (Jacobs et al. 1991); the rule is "dense".
    Args: weights and biases are drawn evenly from -init to init, the gate's from -gate_init to gate_init:
    0 gives every expert an equal share at the start.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_outputs: int = 1,
        squash: str = "logistic",
        *,
        init: float = 0.1,
        gate_init: float = 0.0,
    ) -> None:
        super().__init__()
        check_bounds(init, gate_init)
        self.experts = LinearExperts(width, num_experts, num_outputs, squash)
        dense = build_router("dense", width, num_experts, num_experts)
        self.router = Router(width, num_experts, rule=dense.rule, bias=True)
        self.experts.reset_parameters(init)
        for own in self.router.parameters():
            nn.init.uniform_(own, -gate_init, gate_init)

    def forward(self, x: Float[Tensor, "T D"]) -> MixtureOutput:
        """Return all outputs, the gate's logits and the blend."""
        outputs, logits = self.experts(x), self.router(x)
        p = torch.softmax(logits, dim=-1).to(outputs.dtype)
        return MixtureOutput(outputs, logits, torch.einsum("te,tec->tc", p, outputs))


class HiddenLayer(nn.Module):
    """A net with one logistic hidden layer: x [T, D] -> MixtureOutput with one expert, to be trained by the
    same error functions.

    Equation: y = squash(V sigmoid(W x + b) + c).
    Args: weights and biases are drawn evenly from -init to init.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        num_outputs: int = 1,
        squash: str = "logistic",
        *,
        init: float = 0.1,
    ) -> None:
        super().__init__()
        if min(width, hidden_width, num_outputs) < 1:
            raise UserError(
                f"width {width}, hidden_width {hidden_width}, num_outputs {num_outputs}; allowed: 1 or more"
            )
        check_bounds(init, 0.0)
        self.squash = check_squash(squash)
        self.hidden, self.output = nn.Linear(width, hidden_width), nn.Linear(hidden_width, num_outputs)
        for own in self.parameters():
            nn.init.uniform_(own, -init, init)

    def forward(self, x: Float[Tensor, "T D"]) -> MixtureOutput:
        """Return the one output, a gate that is sure of it, and the output again as blend."""
        y = squash(self.squash, self.output(torch.sigmoid(self.hidden(x))))
        return MixtureOutput(y.unsqueeze(-2), y.new_zeros(*y.shape[:-1], 1), y)


def check_bounds(init: float, gate_init: float) -> None:
    """Raise UserError for bounds of first weights that no model can start from."""
    if not init > 0:
        raise UserError(
            f"init {init}; allowed: above 0; experts that start equal stay equal, as does a hidden layer"
        )
    if not gate_init >= 0:
        raise UserError(f"gate_init {gate_init}; allowed: 0 or more; 0 gives all experts an equal share")
