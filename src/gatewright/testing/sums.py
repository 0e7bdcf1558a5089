"""What a router says to a loss beside its choice: held to the slow definition in values and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatewright.testing.report import Mismatch, near
from gatewright.testing.rule import Rule
from gatewright.testing.slow_routers import SlowSums

# By name: the numbers, and the gradient [T, E] of sum_i (1 + i) s_i, none where it is a constant.
Sums = dict[str, tuple[list[float], Tensor | None]]

# T2T divides loads by |X_i| + 1e-10, where the paper has |X_i| alone: either may be had. ReMoE's lambda is
# a state, kept in fp32.
_LEAST = {"load": 1e-9, "next_penalty": 1e-6}


@dataclass(frozen=True)
class Summed:
    """One call's numbers: what was found, and what the definition is given."""

    rows: list[list[Tensor]]
    num_selected: int
    options: Mapping[str, Any]
    found: Mapping[str, list[float]]


def weigh(values: Tensor) -> Tensor:
    """Return sum_i (1 + i) s_i."""
    flat = values.reshape(-1)
    return (flat * torch.arange(1, flat.shape[0] + 1, dtype=flat.dtype)).sum()


def slow_sums(
    definition: SlowSums, logits: Tensor, kept: Tensor, num_selected: int, options: Mapping[str, Any]
) -> Sums:
    """Return a definition's sums over the tokens `kept` [T] bool, whose own options are given alone."""
    exact = logits.clone().requires_grad_()
    rows = [list(row) for row in exact[kept]]
    found: Sums = {}
    for name, values in definition(rows, num_selected, dict(options)).items():
        total = weigh(torch.stack(values))
        slopes = torch.autograd.grad(total, exact, retain_graph=True)[0] if total.requires_grad else None
        found[name] = ([value.item() for value in values], slopes)
    return found


def hold_sums(
    case: str, found: Mapping[str, Tensor], logits: Tensor, kept: Tensor, wanted: Sums, tolerance: float
) -> None:
    """Compare sums, made of `logits` that require gradient, and their gradients for real tokens."""
    for name, values in found.items():
        if name not in wanted:
            raise Mismatch(case, f"returned a sum named {name!r}", f"some of {', '.join(wanted)}")
        close = max(tolerance, _LEAST.get(name, 0))
        expected, slopes = wanted[name]
        if values.numel() != len(expected):
            raise Mismatch(case, f"{name} has {values.numel()} numbers", str(len(expected)))
        for e, (one, other) in enumerate(zip(values.reshape(-1).tolist(), expected, strict=True)):
            if not near(one, other, close):
                raise Mismatch(case, f"{name} [{e}] is {one:.9g}", f"{other:.9g}")
        if slopes is None:
            continue
        if not values.requires_grad:
            raise Mismatch(case, f"{name} carries no gradient, so it teaches nothing")
        (moved,) = torch.autograd.grad(weigh(values), logits, retain_graph=True)
        for t in kept.nonzero().flatten().tolist():
            for e in range(slopes.shape[1]):
                one, other = moved[t, e].item(), slopes[t, e].item()
                if not near(one, other, close * 10 * slopes.shape[1]):
                    raise Mismatch(
                        case, f"{name}: token {t}, gradient of logit {e} is {one:.9g}", f"{other:.9g}"
                    )


def explained_sums(rule: Rule, calls: Sequence[Summed], tolerance: float) -> list[str]:
    """Return the known mistakes that give every sum that was found."""

    def gives(definition: SlowSums) -> bool:
        for call in calls:
            expected = definition(call.rows, call.num_selected, dict(call.options))
            for name, numbers in call.found.items():
                pairs = zip(numbers, expected.get(name, []), strict=False)
                close = max(tolerance, _LEAST.get(name, 0))
                if len(numbers) != len(expected.get(name, ())) or not all(
                    near(one, other.item(), close) for one, other in pairs
                ):
                    return False
        return True

    if not calls or rule.sums is None:
        return []
    if gives(rule.sums):
        return ["all sums have their values: a gradient is missing, or is that of another path"]
    return [what for what, definition in rule.wrong_sums.items() if gives(definition)]
