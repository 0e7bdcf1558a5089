"""Cross-entropy of cases that belong to one class each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gatewright.kernels.cross_entropy import cross_entropy
from gatewright.objectives.next_token import Loss


class ClassOutput(Protocol):
    """What a classifier says of its cases."""

    @property
    def logits(self) -> Tensor:
        """[T, C], before the softmax."""


@dataclass(frozen=True)
class ClassLoss:
    """total = the mean over cases of -log softmax(logits)[class]."""

    def __call__(self, output: ClassOutput, targets: Tensor) -> Loss:
        """Return the Loss for classes [T] int64; there are no losses over routers in it."""
        total = cross_entropy(output.logits, targets)
        none = torch.zeros_like(total.detach())
        return Loss(total, total, none, none)
