"""Learning Factored Representations in a Deep Mixture of Experts (Eigen, Ranzato and Sutskever, 2013).

Two mixtures one above the other, each blending the hidden vectors of all its experts by a gate with a hidden
layer, under a linear classifier: the pairs of experts are as many as the product of the layers. In the first
phase of training an expert that is ahead of the others by a margin is left out; the second phase lifts that.

Equations: z1 = sum_i g1_i(x) f1_i(x); z2 = sum_j g2_j(z1) f2_j(z1); F(x) = softmax(W3 z2 + b3); f(x) =
relu(W x + b); g(x) = softmax(B relu(A x + a) + b). Phase 1: with G_i(t) the sum of g_i over the examples so
far and Gbar its mean over experts, g_i(x_t) = 0 where G_i - Gbar > m, the others renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gatewright.backbones import DeepMixture
from gatewright.errors import UserError
from gatewright.objectives import ClassLoss


@dataclass(frozen=True)
class Settings:
    """Two layers of four experts for shifted 8 x 8 digits; what the paper does not give is called ours."""

    width: int = 256
    """D, numbers per case: 16 x 16 for the small digits, 36 x 36 = 1296 for the paper's"""
    num_experts: tuple[int, ...] = (4, 4)
    """E of each layer; as many layers as numbers"""
    expert_width: tuple[int, ...] = (40, 20)
    """hidden units of each expert of a layer"""
    gate_width: tuple[int, ...] = (20, 20)
    """hidden units of each layer's gate"""
    num_classes: int = 10
    """C, classes"""
    top: str = "mixture"
    """what the last layer does: mixture, single (one expert), concat (side by side); plain has no mixture"""
    margin: float = 100.0
    """m, how many examples' worth of gate an expert may be ahead of the mean in the first phase (ours)"""
    init_scale: float = 1.0
    """variance of the first weights times their fan-in (ours)"""


def _mnist(widths: tuple[int, ...], gates: tuple[int, ...]) -> Settings:
    return Settings(1296, (4,) * len(widths), widths, gates)


PUBLISHED: dict[str, Settings] = {
    # Table 1, MNIST on a canvas of 36 x 36; the name gives the experts' and the gates' hidden units.
    "deep-moe-100-100-gates-50-50": _mnist((100, 100), (50, 50)),
    "deep-moe-100-20-gates-50-50": _mnist((100, 20), (50, 50)),
    "deep-moe-100-20-gates-50-20": _mnist((100, 20), (50, 20)),
    "deep-moe-50-20-gates-20-20": _mnist((50, 20), (20, 20)),
    "deep-moe-100-gate-50": _mnist((100,), (50,)),
    # Table 2, speech: 11 frames of 40 numbers, 40 phones.
    "deep-moe-speech": Settings(440, (4, 16), (128, 128), (64, 64), 40),
    "deep-moe-speech-one-layer": Settings(440, (4,), (128,), (64,), 40),
}


def build(settings: Settings) -> DeepMixture:
    """Return the stacked mixtures, freshly drawn."""
    s = settings
    return DeepMixture(
        s.width,
        s.num_experts,
        s.expert_width,
        s.gate_width,
        s.num_classes,
        s.top,
        init_scale=s.init_scale,
    )


def objective(settings: Settings) -> ClassLoss:
    """Return the cross-entropy of the classes; both phases have the same."""
    return ClassLoss()


def parameters(settings: Settings) -> int:
    """Return how many weights the model has, gates included."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(settings).parameters())


def plain_twin(settings: Settings) -> Settings:
    """Return the net of two hidden layers with the second as wide as one expert of `settings` and the first
    so wide that the weights are as many, gates included (table 1's DNN).
    """
    s = settings
    if len(s.expert_width) != 2:
        raise UserError(f"a plain twin of {len(s.expert_width)} layers; allowed: 2 layers")
    top = s.expert_width[1]
    # D h + h + h top + top + C top + C = parameters, solved for h.
    rest = parameters(s) - top - s.num_classes * top - s.num_classes
    return replace(s, top="plain", expert_width=(round(rest / (s.width + 1 + top)), top))


DEVIATIONS: tuple[str, ...] = (
    "Margin, step size, batch, momentum, first weights and the length of either phase are not in the paper: "
    "ours stand beside every result.",
    "Totals count the gates that were used, before the example that they judge; the paper does not say "
    "whether its sum includes the example itself.",
    "The text speaks of two linear and rectification layers in a gate, its formula has one and a softmax: we "
    "follow the formula.",
    "The paper's plain net has the same number of second-layer units: we read those of one expert.",
)
