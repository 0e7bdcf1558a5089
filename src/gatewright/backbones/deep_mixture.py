"""Mixtures stacked as layers of one network, each blending its experts' hidden vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError, did_you_mean
from gatewright.parts import HiddenGate, LinearExperts, restrain

TOPS = ("mixture", "single", "concat", "plain")
"""What the last layer does with its experts: blends them, has one only, or puts them side by side; in "plain"
no layer has more than one expert, nor a gate."""


class DeepOutput(NamedTuple):
    """T cases: `logits` [T, C], the `gates` [T, E] of each layer that has them, and the `totals` [E] of those
    layers after these cases (empty without the constraint).
    """

    logits: Float[Tensor, "T C"]
    gates: tuple[Tensor, ...]
    totals: tuple[Tensor, ...]


class MixtureLayer(nn.Module):
    """E experts and, unless `gate_width` is 0, a gate on the same input.

    Equation: z = sum_i g_i(x) f_i(x), f_i(x) = relu(W_i x + b_i) (Eigen et al. 2013); without a gate the
    outputs stand side by side.
    """

    def __init__(self, width: int, num_experts: int, expert_width: int, gate_width: int) -> None:
        super().__init__()
        self.experts = LinearExperts(width, num_experts, expert_width, "relu")
        self.gate = HiddenGate(width, gate_width, num_experts) if gate_width else None
        self.num_experts = num_experts
        self.width = expert_width if gate_width else num_experts * expert_width

    def blend(self, x: Float[Tensor, "T D"], gates: Float[Tensor, "T E"] | None) -> Float[Tensor, "T H"]:
        """Return the experts' outputs weighed by `gates`, or side by side without."""
        outputs = self.experts(x)
        return outputs.flatten(1) if gates is None else torch.einsum("te,tec->tc", gates, outputs)


class DeepMixture(nn.Module):
    """Layers of experts, each seeing what the one below has blended, and a linear map: x [T, D] ->
    DeepOutput.

    Equation: z1 = sum_i g1_i(x) f1_i(x), z2 = sum_j g2_j(z1) f2_j(z1), F(x) = softmax(W3 z2 + b3) (Eigen et
    al. 2013); `logits` are before the softmax.
    Args: a number per layer in each sequence; `top`, one of TOPS. Weights are drawn evenly with variance
    init_scale / fan-in, biases are 0.
    """

    def __init__(
        self,
        width: int,
        num_experts: Sequence[int],
        expert_width: Sequence[int],
        gate_width: Sequence[int],
        num_classes: int,
        top: str = "mixture",
        *,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check(num_experts, expert_width, gate_width, num_classes, top, init_scale)
        layers = []
        for place, (experts, own, gate) in enumerate(zip(num_experts, expert_width, gate_width, strict=True)):
            last = place == len(num_experts) - 1
            if top == "plain" or (last and top == "single"):
                experts, gate = 1, 0
            layers.append(MixtureLayer(width, experts, own, 0 if last and top == "concat" else gate))
            width = layers[-1].width
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, num_classes)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                bound = (3 * init_scale / weight.shape[-1]) ** 0.5
                nn.init.uniform_(weight, -bound, bound)

    def begin(self) -> tuple[Tensor, ...]:
        """Return totals of 0 for every layer that has a gate: what the first phase starts with."""
        gated = [layer for layer in self._layers() if layer.gate is not None]
        return tuple(torch.zeros(layer.num_experts, dtype=torch.float64) for layer in gated)

    def _layers(self) -> list[MixtureLayer]:
        return [cast("MixtureLayer", layer) for layer in self.layers]

    def forward(
        self,
        x: Float[Tensor, "T D"],
        totals: Sequence[Tensor] | None = None,
        margin: float = 0.0,
        *,
        batched: bool = False,
    ) -> DeepOutput:
        """Return logits, gates and totals; with `totals` (those of the examples before) the gates are
        restrained, as in the first phase of training.
        """
        held = list(totals or ())
        gates: list[Tensor] = []
        after: list[Tensor] = []
        for layer in self._layers():
            own = None
            if layer.gate is not None:
                scores = layer.gate(x)
                if totals is None:
                    own = torch.softmax(scores, dim=-1)
                else:
                    own, new = restrain(scores, held[len(gates)], margin, batched=batched)
                    after.append(new)
                own = own.to(x.dtype)
                gates.append(own)
            x = layer.blend(x, own)
        return DeepOutput(self.head(x), tuple(gates), tuple(after))


def _check(
    num_experts: Sequence[int],
    expert_width: Sequence[int],
    gate_width: Sequence[int],
    num_classes: int,
    top: str,
    init_scale: float,
) -> None:
    sizes = [len(num_experts), len(expert_width), len(gate_width)]
    if len(set(sizes)) != 1 or not sizes[0]:
        raise UserError(
            f"num_experts, expert_width and gate_width for {', '.join(map(str, sizes))} layers; allowed: a "
            "number for each layer in each of the three"
        )
    if min(*gate_width, num_classes) < 1:
        raise UserError(f"gate_width {list(gate_width)}, num_classes {num_classes}; allowed: 1 or more")
    if top not in TOPS:
        raise UserError(f"top {top!r} is unknown{did_you_mean(top, TOPS)}; allowed: {', '.join(TOPS)}")
    if not init_scale > 0:
        raise UserError(f"init_scale {init_scale}; allowed: above 0; experts that start equal stay equal")
