"""Adaptive Mixtures of Local Experts (Jacobs, Jordan, Nowlan and Hinton, Neural Computation 3(1), 1991).

A gate and several networks see the same input. The error is that of a mixture of Gaussians, so that an expert
learns a case in proportion to how well it does it compared with the others: experts compete for cases and
divide them. All experts are computed; only the answer blends them.

Equations: 1.1, |d - sum p_i o_i|^2; 1.2, sum p_i |d - o_i|^2; 1.3, -log sum p_i exp(-|d - o_i|^2 / 2), which
every simulation uses; 1.4 and 1.5 are the gradients of 1.2 and 1.3 with respect to o_i.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import HiddenLayer, Mixture
from gatewright.errors import UserError
from gatewright.objectives import CaseError


@dataclass(frozen=True)
class Settings:
    """The mixture of four experts on two formants; what the paper does not give is called ours."""

    width: int = 2
    """D, numbers per case: F1 and F2 in kHz"""
    num_outputs: int = 1
    """C, outputs per expert: 1 (reading A), or one per class (reading B)"""
    squash: str = "logistic"
    """of the outputs: logistic (reading A), softmax (reading B), linear (regression)"""
    num_experts: int = 4
    """E, experts; 0 is one net with a hidden layer instead, trained by back-propagation"""
    hidden_width: int = 6
    """hidden units of that one net"""
    error: str = "mixture"
    """blend (1.1), expected (1.2) or mixture (1.3)"""
    init: float = 0.1
    """weights of experts and nets are drawn evenly from -init to init (ours)"""
    gate_init: float = 0.0
    """the same of the gate: 0 starts all experts at equal shares, as the paper says"""


PUBLISHED: dict[str, Settings] = {
    # Table 1. One logistic output per expert: 24 and 48 parameters against the nets' 25 and 49.
    "local-experts-4": Settings(num_experts=4),
    "local-experts-8": Settings(num_experts=8),
    "back-propagation-6": Settings(num_experts=0, hidden_width=6),
    "back-propagation-12": Settings(num_experts=0, hidden_width=12),
}


def build(settings: Settings) -> nn.Module:
    """Return the mixture, or with `num_experts` 0 the one net, freshly drawn."""
    s = settings
    if s.num_experts < 0:
        raise UserError(f"num_experts {s.num_experts}; allowed: 0 or more; 0 is one net with a hidden layer")
    if s.num_experts == 0:
        return HiddenLayer(s.width, s.hidden_width, s.num_outputs, s.squash, init=s.init)
    return Mixture(s.width, s.num_experts, s.num_outputs, s.squash, init=s.init, gate_init=s.gate_init)


def objective(settings: Settings) -> CaseError:
    """Return the error summed over cases; for one net, 1.3 is half the squared error."""
    return CaseError(settings.error)


DEVIATIONS: tuple[str, ...] = (
    "The paper says neither how the vowels are coded nor how many outputs an expert has: one logistic output "
    "with [i], [a] as 1 and [I], [^] as 0 is our reading (A), four softmax outputs the other one (B).",
    "Step sizes and initial weights are not in the paper: ours stand beside every result.",
    "One net minimises half the squared error, 1.3 with a single expert; the paper does not say which factor "
    "its back-propagation has.",
    "Our copy of the measurements has 76 speakers, the paper speaks of 75: the last one is left out.",
)
