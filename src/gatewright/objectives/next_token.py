"""Next-token prediction: the task loss of language models, and its sum with the routers' losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.balancing import balance_loss, z_loss
from gatewright.parts.stats import Stats


class Loss(NamedTuple):
    """`total` is what is differentiated; the rest, all 0-d, says what it is made of. `task` is in nats per
    token.
    """

    total: Tensor
    task: Tensor
    balance: Tensor
    z: Tensor


class ModelOutput(Protocol):
    """What a language model returns."""

    @property
    def logits(self) -> Tensor:
        """[B, S, V]."""

    @property
    def stats(self) -> Stats:
        """One record per router."""


@dataclass(frozen=True)
class NextToken:
    """total = cross-entropy + balance_weight * balance_loss + z_weight * z_loss (both: mean over routers,
    see their docstrings).
    """

    balance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        if not (self.balance_weight >= 0 and self.z_weight >= 0):
            raise UserError(
                f"balance_weight {self.balance_weight}, z_weight {self.z_weight}; allowed: 0 or more"
            )

    def __call__(self, output: ModelOutput, targets: Tensor) -> Loss:
        """Return the Loss; `targets` [B, S] int64 is the token that follows each; cross-entropy is taken
        in at least fp32.
        """
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        task = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        balance, z = balance_loss(output.stats), z_loss(output.stats)
        total = task
        if len(output.stats):
            total = total + self.balance_weight * balance + self.z_weight * z
        return Loss(total, task, balance.detach(), z.detach())
