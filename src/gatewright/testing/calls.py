"""The calls that hold a router to its rule: what a function is given, and what must come of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gatewright.testing.draws import draws, is_clear
from gatewright.testing.rule import Rule
from gatewright.testing.rules import RULES
from gatewright.testing.sums import Sums, slow_sums

_PER_TOKEN = (
    *("coins", "later_coins", "token_ids", "noise", "noise_logits"),
    *("primary", "primary_noise", "primary_noise_logits"),
)
_ABSENT: dict[str, Any] = {"num_groups": 1, "groups_kept": 1, "scale": 1.0, "capacity": None}


@dataclass
class Call:
    """One call of the function: what it is given, what must come of it, and what came."""

    name: str
    logits: Tensor
    num_selected: int
    options: dict[str, Any]
    expected: list[dict[int, float]]
    tie: bool = False
    mask: Tensor | None = None
    slopes: Tensor | None = None
    found: list[dict[int, float]] | None = None
    by_hand: dict[str, list[float]] = field(default_factory=dict)
    sums: Sums = field(default_factory=dict)
    found_sums: dict[str, list[float]] = field(default_factory=dict)


@lru_cache(maxsize=64)
def calls_of(name: str, options: tuple[tuple[str, Any], ...]) -> tuple[Call, ...]:
    """Return the calls of a rule; the same ones serve every check."""
    rule, fixed = RULES[name], dict(options)
    calls = (*_by_hand(name, rule, fixed), *_drawn(name, rule, fixed))
    return tuple(
        replace(call, slopes=slopes_of(rule, call) if rule.learns else None, sums=_sums(rule, call))
        for call in calls
    )


def _by_hand(name: str, rule: Rule, fixed: Mapping[str, Any]) -> Iterator[Call]:
    """Yield the cases worked by hand that the fixed options leave."""
    for case in rule.cases:
        num_experts = len(case.rows[0])
        given = {key: case.options.get(key, _ABSENT.get(key)) for key in rule.takes}
        facts = {**given, "num_selected": case.num_selected, "num_experts": num_experts}
        # Weights are proportional to the scale, so that any scale can be had.
        if any(facts[key] != value for key, value in fixed.items() if key != "scale"):
            continue
        factor = fixed.get("scale", 1.0) / (given.get("scale", 1.0) if "scale" in fixed else 1.0)
        if "scale" in fixed:
            given["scale"] = fixed["scale"]
        if "bias" in rule.takes:
            given["bias"] = given["bias"] or (0.0,) * num_experts
        tensors = {key: _tensor(value) for key, value in given.items() if isinstance(value, tuple)}
        logits = torch.tensor(case.rows, dtype=torch.float64)
        expected = [{e: factor * weight for e, weight in token.items()} for token in case.expected]
        own = {sum_: list(values) for sum_, values in case.sums.items()}
        yield Call(
            f"{name}, {case.name}",
            logits,
            case.num_selected,
            {**given, **tensors},
            expected,
            case.tie,
            by_hand=own,
        )


def _tensor(value: tuple[Any, ...]) -> Tensor:
    """Return whole numbers as int64, others as fp64."""
    found = torch.tensor(value)
    return torch.tensor(value, dtype=torch.float64) if found.is_floating_point() else found


def _drawn(name: str, rule: Rule, fixed: Mapping[str, Any]) -> Iterator[Call]:
    """Yield random calls."""
    for draw in draws(rule, fixed):
        expected = _numbers(rule.slow(rows_of(draw.logits), draw.num_selected, draw.options))
        yield Call(f"{name}, {draw.name}", draw.logits, draw.num_selected, draw.options, expected)


def rows_of(logits: Tensor) -> list[list[Tensor]]:
    return [list(row) for row in logits]


def _numbers(weights: list[dict[int, Tensor]]) -> list[dict[int, float]]:
    return [{e: weight.item() for e, weight in token.items()} for token in weights]


def padded(call: Call, rule: Rule) -> Call | None:
    """Return the same call with every third token padding, of large logits; None where ties would decide."""
    if call.logits.shape[0] < 3 or call.tie:
        return None
    mask = torch.arange(call.logits.shape[0]) % 3 != 1
    logits = torch.where(mask.unsqueeze(-1), call.logits, 50 - 9 * call.logits)
    real = {key: value[mask] if key in _PER_TOKEN else value for key, value in call.options.items()}
    if not is_clear(rule, logits[mask], call.num_selected, real, torch.Generator().manual_seed(0)):
        return None
    slow = iter(_numbers(rule.slow(rows_of(logits[mask]), call.num_selected, real)))
    expected = [next(slow) if kept else {} for kept in mask.tolist()]
    name = f"{call.name}, with padding"
    other = Call(name, logits, call.num_selected, call.options, expected, mask=mask)
    return replace(other, sums=_sums(rule, other))


def kept_tokens(call: Call) -> Tensor:
    return torch.ones(call.logits.shape[0], dtype=torch.bool) if call.mask is None else call.mask


def _own_options(call: Call) -> dict[str, Any]:
    """Return the options with those of real tokens alone."""
    return {k: v[kept_tokens(call)] if k in _PER_TOKEN else v for k, v in call.options.items()}


def _sums(rule: Rule, call: Call) -> Sums:
    """Return the sums by the slow definition, with the values that are worked by hand."""
    if rule.sums is None:
        return {}
    sums = slow_sums(rule.sums, call.logits, kept_tokens(call), call.num_selected, _own_options(call))
    return {name: (call.by_hand.get(name, values), slopes) for name, (values, slopes) in sums.items()}


def slopes_of(rule: Rule, call: Call) -> Tensor:
    """Return the gradient of sum_e (1 + e) w_e by the slow definition."""
    exact = call.logits.clone().requires_grad_()
    kept, options = kept_tokens(call), _own_options(call)
    total = 0 * exact.sum()
    for token in rule.slow(rows_of(exact[kept]), call.num_selected, options):
        for e, weight in token.items():
            total = total + (1 + e) * weight
    return torch.autograd.grad(total, exact)[0]
