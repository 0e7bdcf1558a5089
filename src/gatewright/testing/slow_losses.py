"""Losses by their definitions: one token and one expert at a time. Nothing here imports the parts it judges.

A `Seen` is what one router did with its real tokens; a `Setting` says what is not in it (devices) and holds
the known mistakes, off in the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gatewright.testing.slow_routers import Row, add, ranked, scores_of, softmax


@dataclass(frozen=True)
class Seen:
    """Per real token: its logits, the experts that it was sent to (first choice first), and its sequence."""

    num_experts: int
    rows: list[Row] = field(default_factory=list)
    chosen: list[list[int]] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)

    def scores(self, setting: Setting) -> list[Row]:
        """Return scores that sum to 1 over experts."""
        found = []
        for row in self.rows:
            scores = softmax(row)
            if setting.scores == "sigmoid":
                scores = scores_of("sigmoid", row)
                total = add(scores)
                scores = [score / total for score in scores]
            found.append(softmax(scores) if setting.twice else scores)
        return found

    def choices(self, setting: Setting) -> list[list[int]]:
        """Return each token's experts, its own or, by a mistake, those of its highest logits."""
        if not setting.choose_again:
            return self.chosen
        return [
            ranked([value.item() for value in row], len(own))
            for row, own in zip(self.rows, self.chosen, strict=True)
        ]

    def sequences(self) -> list[Seen]:
        """Return each sequence that holds tokens, as a Seen of its own."""
        found = []
        for s in sorted(set(self.sequence)):
            own = [i for i, at in enumerate(self.sequence) if at == s]
            found.append(
                Seen(
                    self.num_experts,
                    [self.rows[i] for i in own],
                    [self.chosen[i] for i in own],
                    [s] * len(own),
                )
            )
        return found


@dataclass(frozen=True)
class Setting:
    """`scores`, `num_devices` D, `devices_kept` M; then mistakes: scores put through a softmax twice, choices
    made again from logits, first choices only, layers pooled, padding counted.
    """

    scores: str = "softmax"
    num_devices: int = 1
    devices_kept: int = 1
    twice: bool = False
    choose_again: bool = False
    first_only: bool = False
    pooled: bool = False
    padding: bool = False


Loss = Callable[[Seen, Setting], Tensor]


def mean(values: list[Tensor]) -> Tensor:
    """Return the mean; 0 of nothing."""
    return add(values) / len(values) if values else torch.zeros((), dtype=torch.float64)


def _loads(seen: Seen, setting: Setting) -> list[int]:
    """Return how often each expert is chosen."""
    loads = [0] * seen.num_experts
    for chosen in seen.choices(setting):
        for e in chosen[: 1 if setting.first_only else None]:
            loads[e] += 1
    return loads


def _mean_scores(seen: Seen, setting: Setting) -> list[Tensor]:
    """Return P, the mean score of each expert."""
    scores = seen.scores(setting)
    return [mean([token[e] for token in scores]) for e in range(seen.num_experts)]


def balance(seen: Seen, setting: Setting) -> Tensor:
    """Return E sum_e f_e P_e with f the share of all choices (Switch eq 4-6, for any K)."""
    loads = _loads(seen, setting)
    terms = [
        load / max(sum(loads), 1) * p for load, p in zip(loads, _mean_scores(seen, setting), strict=True)
    ]
    return seen.num_experts * add(terms)


def sequence_balance(seen: Seen, setting: Setting) -> Tensor:
    """Return the mean over sequences of each one's balance loss (DeepSeek-V3 eq 17-20)."""
    return mean([balance(own, setting) for own in seen.sequences()])


def gshard(seen: Seen, setting: Setting) -> Tensor:
    """Return the mean over sequences of E sum_e (c_e / S) m_e, c first choices (GShard, times E^2)."""
    return sequence_balance(seen, replace(setting, first_only=True))


def z(seen: Seen, setting: Setting) -> Tensor:
    """Return the mean of (ln sum_e e^l)^2 (ST-MoE eq 5); by a mistake, of probabilities."""
    squares = []
    for row in seen.rows:
        values = softmax(row) if setting.twice else row
        highest = max(value.item() for value in values)
        squares.append((add([(value - highest).exp() for value in values]).log() + highest) ** 2)
    return mean(squares)


def _squared_variation(values: list[Tensor]) -> Tensor:
    middle = mean(values)
    if not middle.item():
        return torch.zeros((), dtype=torch.float64)
    return mean([(value - middle) ** 2 for value in values]) / middle**2


def importance(seen: Seen, setting: Setting) -> Tensor:
    """Return the variance over the squared mean, over experts, of summed scores (V-MoE's L_imp)."""
    return _squared_variation(_mean_scores(seen, setting))


def load(seen: Seen, setting: Setting) -> Tensor:
    """Return the same of the experts' loads."""
    return _squared_variation([torch.tensor(float(n), dtype=torch.float64) for n in _loads(seen, setting)])


def _by_device(seen: Seen, setting: Setting) -> list[range]:
    size = seen.num_experts // setting.num_devices
    return [range(d * size, (d + 1) * size) for d in range(setting.num_devices)]


def device(seen: Seen, setting: Setting) -> Tensor:
    """Return sum_d f'_d P'_d: the mean of E counts_e / (K T) and the sum of P_e over the device's experts."""
    loads, shares = _loads(seen, setting), _mean_scores(seen, setting)
    terms = []
    for experts in _by_device(seen, setting):
        f = sum(seen.num_experts * loads[e] / max(sum(loads), 1) for e in experts) / len(experts)
        terms.append(f * add([shares[e] for e in experts]))
    return add(terms)


def communication(seen: Seen, setting: Setting) -> Tensor:
    """Return sum_d f''_d P''_d, f''_d = D / (M T) times the tokens that use an expert of device d."""
    shares, tokens = _mean_scores(seen, setting), max(len(seen.rows), 1)
    terms = []
    for experts in _by_device(seen, setting):
        received = sum(any(e in experts for e in chosen) for chosen in seen.choices(setting))
        f = setting.num_devices * received / (setting.devices_kept * tokens)
        terms.append(f * add([shares[e] for e in experts]))
    return add(terms)


LOSSES: dict[str, Loss] = {
    "balance": balance,
    "sequence_balance": sequence_balance,
    "gshard": gshard,
    "z": z,
    "importance": importance,
    "load": load,
    "device": device,
    "communication": communication,
}
