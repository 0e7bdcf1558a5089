"""Next-token prediction: the task loss of language models, and its sum with the routers' losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import cross_entropy
from gatewright.parts.balancing import SCOPES, Scope, balance_loss, z_loss
from gatewright.parts.losses import named_loss
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


def check_weights(settings: Any, *names: str) -> None:
    """Raise UserError unless each named setting is 0 or more: a weight, or a rate."""
    for name in names:
        if not getattr(settings, name) >= 0:
            raise UserError(f"{name} {getattr(settings, name)}; allowed: 0 or more")


@dataclass(frozen=True)
class NextToken:
    """total = cross-entropy + balance_weight * balance_loss + z_weight * z_loss + sum over `losses` of weight
    * loss (all: mean over routers, see their docstrings).

    `losses`: weights by name (`gatewright.parts.losses.named_loss`), for what those two lack. `scope`: over
    what the balance loss asks for evenness; "global_batch" needs the counts handed in at each call.
    `future_weight` lambda: of the mean cross-entropy of the tokens behind the next, where the model predicts
    them (DeepSeek-V3 eq 25: (lambda / D) sum over depths k of the cross-entropy of token i + k + 1 at i).
    """

    balance_weight: float = 0.0
    z_weight: float = 0.0
    losses: Mapping[str, float] = field(default_factory=dict)
    scope: Scope = "micro_batch"
    future_weight: float = 0.0

    def __post_init__(self) -> None:
        if not (self.balance_weight >= 0 and self.z_weight >= 0):
            raise UserError(
                f"balance_weight {self.balance_weight}, z_weight {self.z_weight}; allowed: 0 or more"
            )
        if not self.future_weight >= 0:
            raise UserError(f"future_weight {self.future_weight}; allowed: 0 or more")
        for name, weight in self.losses.items():
            named_loss(name)
            if not weight >= 0:
                raise UserError(f"losses {name} {weight}; allowed: 0 or more")
        if self.scope not in SCOPES:
            raise UserError(
                f"scope {self.scope!r} is unknown{did_you_mean(self.scope, SCOPES)}; allowed: "
                f"{', '.join(SCOPES)}"
            )

    def __call__(
        self, output: ModelOutput, targets: Tensor, counts: Mapping[str, Tensor] | None = None
    ) -> Loss:
        """Return the Loss; `targets` [B, S] int64 is the token that follows each; cross-entropy is taken
        in at least fp32. `counts`: each router's counts over the global batch, for that scope.
        """
        task = cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        counts = counts if self.scope == "global_batch" else None
        balance, z = balance_loss(output.stats, self.scope, counts), z_loss(output.stats)
        total = task
        for name, weight in self.losses.items() if len(output.stats) else ():
            total = total + weight * named_loss(name)(output.stats)
        if len(output.stats):
            total = total + self.balance_weight * balance + self.z_weight * z
        further = getattr(output, "future", ())
        for depth, logits in enumerate(further, 1):
            ahead = cross_entropy(logits.flatten(0, 1), targets[:, depth:].flatten())
            total = total + self.future_weight / len(further) * ahead
        return Loss(total, task, balance.detach(), z.detach())
