"""A tree of gates over linear experts: every gate and every expert sees the case (Jordan and Jacobs 1994)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.backbones.cases import MixtureOutput, check_bounds
from gatewright.errors import UserError
from gatewright.parts import LinearExperts


class ExpertTree(nn.Module):
    """Gates at the inner nodes, E linear experts at the leaves: x [T, D] -> MixtureOutput, whose `logits` are
    ln g_ij: already normalised, so that the error functions of a flat mixture hold for the tree.

    Equations: mu_ij = f(U_ij x) (2.1), g_i = softmax(v_i . x) (2.2, 2.3), g_j|i = softmax(v_ij . x) (2.4,
    2.5), mu = sum_i g_i sum_j g_j|i mu_ij; deeper trees multiply the gates along the path.
    Args: `branching` is the branches of a gate by level, from the top; (2, 2, 2, 2) has 15 gates and 16
    experts. Weights and biases are drawn evenly from -init to init, the gates' from -gate_init to gate_init.
    `covariance` [E, C, C], a buffer, is that of Gaussian experts; the blend does not depend on it.
    Raises: UserError for an empty branching, branches below 2, an unknown squash and bounds out of range.
    """

    covariance: Float[Tensor, "E C C"]

    def __init__(
        self,
        width: int,
        branching: Sequence[int] = (2, 2),
        num_outputs: int = 1,
        squash: str = "linear",
        *,
        init: float = 0.1,
        gate_init: float = 0.1,
    ) -> None:
        super().__init__()
        if not branching or min(branching) < 2:
            raise UserError(
                f"branching {tuple(branching)}; allowed: one number of branches per level, each 2 or more; "
                "(2, 2) has three gates and four experts"
            )
        check_bounds(init, gate_init)
        self.branching = tuple(branching)
        self.num_experts = math.prod(branching)
        self.experts = LinearExperts(width, self.num_experts, num_outputs, squash)
        # The gates of a level are linear maps side by side, as experts are: [T, D] -> [T, nodes, branches].
        self.gates = nn.ModuleList(
            LinearExperts(width, math.prod(branching[:level]), branches, "linear")
            for level, branches in enumerate(branching)
        )
        self.experts.reset_parameters(init)
        for gate in self.levels:
            gate.reset_parameters(gate_init)
        unit = torch.eye(num_outputs).repeat(self.num_experts, 1, 1)
        self.register_buffer("covariance", unit)

    @property
    def levels(self) -> list[LinearExperts]:
        """The gates by level, from the top: `weight` [nodes, branches, D] and `bias` [nodes, branches]."""
        return cast("list[LinearExperts]", list(self.gates))

    def log_gates(self, x: Float[Tensor, "T D"]) -> list[Float[Tensor, "T _ _"]]:
        """Return each level's logarithms of g_j|i, [T, nodes, branches], from the top."""
        return [torch.log_softmax(gate(x), dim=-1) for gate in self.levels]

    def forward(self, x: Float[Tensor, "T D"]) -> MixtureOutput:
        """Return every expert's outputs, ln g_ij, and the blend."""
        joint = join(self.log_gates(x))
        outputs = self.experts(x)
        return MixtureOutput(outputs, joint, torch.einsum("te,tec->tc", joint.exp(), outputs))


def join(levels: Sequence[Float[Tensor, "T _ _"]]) -> Float[Tensor, "T E"]:
    """Return the sum along each path from the root, ln g_ij = ln g_i + ln g_j|i, in the tree's order."""
    joint = levels[0].flatten(1)
    for own in levels[1:]:
        joint = (joint.unsqueeze(-1) + own).flatten(1)
    return joint
