"""Random calls of a router's rule, the same on every run, whose choices no rounding can decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.testing.rule import Rule

_TRIES = 200
# Drawn anew for every call: nothing to fix.
_PER_CALL = (
    *("bias", "coins", "later_coins", "table", "token_ids", "noise", "noise_logits"),
    *("primary", "primary_noise", "primary_noise_logits", "num_primary", "penalty"),
)
_OF_NOISE = {"noise", "later_coins", "penalty"}


@dataclass(frozen=True)
class Draw:
    """One random call: logits [T, E] fp64, K and the options."""

    name: str
    logits: Tensor
    num_selected: int
    options: dict[str, Any]


def draws(rule: Rule, fixed: Mapping[str, Any]) -> Iterator[Draw]:
    """Yield random calls of a rule, the same on every run; `fixed` holds what is given for all of them."""
    source = torch.Generator().manual_seed(0)
    for number, (num_tokens, num_experts) in enumerate(_shapes(rule, fixed)):
        counts = list(range(min(rule.least, num_experts), min(num_experts, rule.most) + 1))
        counts = counts if num_experts < 10 else [count for count in counts if count in (1, 2, 8)]
        given = fixed.get("num_selected")
        for num_selected in counts if given is None else [given] if 1 <= given <= num_experts else []:
            if "primary" in rule.takes and not two_levels(num_experts, num_selected):
                continue
            for _ in range(_TRIES):
                # All distinct, so no tie, in steps of 1/16, exact in every dtype.
                places = num_tokens * num_experts
                logits = torch.randperm(places, generator=source).view(num_tokens, num_experts).double()
                logits = (logits - places // 2) / 16 + rule.shift
                options = _options(rule, num_selected, logits, number, source, fixed)
                if is_clear(rule, logits, num_selected, options, source):
                    break
            told = "".join(
                f", {name} {value}" for name, value in options.items() if isinstance(value, int | float)
            )
            yield Draw(
                f"{num_tokens} random tokens, K = {num_selected} of {num_experts}{told}",
                logits,
                num_selected,
                options,
            )


def _shapes(rule: Rule, fixed: Mapping[str, Any]) -> list[tuple[int, int]]:
    if "num_experts" not in fixed:
        return list(rule.shapes)
    return [(num_tokens, fixed["num_experts"]) for num_tokens, _ in rule.shapes]


def two_levels(num_experts: int, num_selected: int) -> list[tuple[int, int]]:
    """Return the pairs (groups, K1) of which no level has one choice of many, which would be no choice."""
    return [
        (groups, first)
        for groups in range(2, num_experts // 2 + 1)
        for first in range(2, groups + 1)
        if num_experts % groups == 0
        and num_selected % first == 0
        and 2 <= num_selected // first <= num_experts // groups
    ]


def _options(
    rule: Rule,
    num_selected: int,
    logits: Tensor,
    number: int,
    source: torch.Generator,
    fixed: Mapping[str, Any],
) -> dict[str, Any]:
    """Return random values of what the rule takes."""
    num_tokens, num_experts = logits.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=source, dtype=torch.float64)

    pairs = [
        (groups, kept)
        for groups in (1, 2, 4, 8)
        for kept in range(1, groups + 1)
        if num_experts % groups == 0
        and num_experts >= 2 * groups
        and kept * num_experts // groups >= num_selected
    ] or [(1, 1)]
    groups, kept = pairs[int(uniform(1).item() * len(pairs))]
    drawn = {
        # Every other shape has biases that leave all scores negative.
        "bias": uniform(num_experts) - (2.0 if number % 2 == 0 else 0.5),
        "num_groups": groups,
        "groups_kept": kept,
        "scale": (2.5, 1.0, 16.0)[number % 3],
        "p": (0.3, 0.6, 0.9)[num_selected % 3],
        "coins": uniform(num_tokens),
        "capacity": max(1, num_tokens // num_experts),
        "table": torch.stack([uniform(num_experts).argsort()[:num_selected] for _ in range(11)]),
        "token_ids": (uniform(num_tokens) * 11).long(),
    }
    if not _OF_NOISE.isdisjoint(rule.takes):
        drawn |= _of_noise(num_tokens, num_experts, num_selected, source)
    return {name: fixed.get(name, drawn[name]) for name in rule.takes}


def _of_noise(
    num_tokens: int, num_experts: int, num_selected: int, source: torch.Generator
) -> dict[str, Any]:
    """Return random noise, groups and coins."""

    def normal(width: int) -> Tensor:
        return torch.randn(num_tokens, width, generator=source, dtype=torch.float64)

    pairs = two_levels(num_experts, num_selected) or [(1, 1)]
    groups, first = pairs[int(torch.randint(len(pairs), (), generator=source))]
    coins = torch.rand(num_tokens, num_selected - 1, generator=source, dtype=torch.float64)
    return {
        "noise": normal(num_experts),
        "noise_logits": normal(num_experts),
        "primary": normal(groups),
        "primary_noise": normal(groups),
        "primary_noise_logits": normal(groups),
        "num_primary": first,
        "later_coins": coins,
        "threshold": (0.2, 0.5, 1.0)[num_selected % 3],
        "penalty": 0.3 + num_tokens,
        "alpha": 1.2,
    }


def is_clear(
    rule: Rule, logits: Tensor, num_selected: int, options: dict[str, Any], source: torch.Generator
) -> bool:
    """Whether the choice stays when logits move by the rule's noise: else rounding could decide it."""
    first = [list(token) for token in rule.slow(_rows(logits), num_selected, options)]
    for _ in range(2):
        moved = logits + rule.noise * torch.randn(logits.shape, generator=source, dtype=torch.float64)
        given = options
        if "primary" in options:
            shake = torch.randn(options["primary"].shape, generator=source, dtype=torch.float64)
            given = {**options, "primary": options["primary"] + rule.noise * shake}
        if [list(token) for token in rule.slow(_rows(moved), num_selected, given)] != first:
            return False
    return True


def _rows(logits: Tensor) -> list[list[Tensor]]:
    return [list(row) for row in logits]


def check_options(name: str, rule: Rule, fixed: Mapping[str, Any]) -> None:
    """Raise UserError for options that the rule does not have."""
    allowed = ("num_selected", "num_experts", *(n for n in rule.takes if n not in _PER_CALL))
    for given in fixed:
        if given not in allowed:
            raise UserError(f"option {given!r} of rule {name!r} is unknown; allowed: {', '.join(allowed)}")
