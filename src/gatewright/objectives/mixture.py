"""The error functions of a mixture on cases with targets (Jacobs, Jordan, Nowlan and Hinton 1991).

A case has a target d, the outputs o_i of its experts, and a gate p = softmax of logits x. Each function takes
outputs [..., E, C], logits [..., E] and targets [..., C], and returns an error per case, [...].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.objectives.next_token import Loss


def _distances(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return |d - o_i|^2, [..., E]."""
    return (targets.unsqueeze(-2) - outputs).square().sum(-1)


def blend_error(outputs: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return each case's error of the blended output: experts have to cancel each other's residuals.

    Equation: 1.1, E = |d - sum_i p_i o_i|^2.
    """
    blend = (torch.softmax(logits, -1).unsqueeze(-1) * outputs).sum(-2)
    return (targets - blend).square().sum(-1)


def expected_error(outputs: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return each case's expected error, if the gate drew one expert.

    Equation: 1.2, E = sum_i p_i |d - o_i|^2. Gradients: dE/do_i = -2 p_i (d - o_i) (1.4), dE/dx_i =
    p_i (|d - o_i|^2 - E).
    """
    return (torch.softmax(logits, -1) * _distances(outputs, targets)).sum(-1)


def mixture_error(outputs: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return each case's negative log likelihood under a mixture of Gaussians of unit variance, up to a
    constant; with one expert it is |d - o|^2 / 2.

    Equation: 1.3, E = -log sum_i p_i exp(-|d - o_i|^2 / 2). Gradients: dE/do_i = -h_i (d - o_i) (1.5),
    dE/dx_i = p_i - h_i, with h of `posteriors`.
    """
    return -torch.logsumexp(torch.log_softmax(logits, -1) - _distances(outputs, targets) / 2, -1)


def posteriors(outputs: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return how far each expert is responsible for each case once its target is known, [..., E].

    Equation: h_i = p_i exp(-|d - o_i|^2 / 2) / sum_j p_j exp(-|d - o_j|^2 / 2).
    """
    return torch.softmax(torch.log_softmax(logits, -1) - _distances(outputs, targets) / 2, -1)


ERRORS = {"blend": blend_error, "expected": expected_error, "mixture": mixture_error}


class CaseOutput(Protocol):
    """What a mixture says of its cases."""

    @property
    def outputs(self) -> Tensor:
        """[T, E, C], of each expert."""

    @property
    def logits(self) -> Tensor:
        """[T, E], of the gate."""


@dataclass(frozen=True)
class CaseError:
    """total = the error summed over the cases, as batch descent in the paper has it (not their mean).

    `error`: blend (1.1), expected (1.2) or mixture (1.3, the one that the paper's simulations use).
    """

    error: str = "mixture"

    def __post_init__(self) -> None:
        if self.error not in ERRORS:
            raise UserError(
                f"error {self.error!r} is unknown{did_you_mean(self.error, ERRORS)}; allowed: "
                f"{', '.join(ERRORS)}"
            )

    def __call__(self, output: CaseOutput, targets: Tensor) -> Loss:
        """Return the Loss for targets [T, C]; there are no losses over routers in it."""
        total = ERRORS[self.error](output.outputs, output.logits, targets).sum()
        none = torch.zeros_like(total.detach())
        return Loss(total, total, none, none)
