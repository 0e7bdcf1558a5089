"""Hold anybody's router to its rule: cases worked by hand, then the slow definition on random logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.testing.draws import check_options, draws, is_clear
from gatewright.testing.report import TOLERANCE, Log, Mismatch, Report, near
from gatewright.testing.rules import RULES, Rule
from gatewright.testing.slow_routers import Choice, Slow

# fn(logits [T, E], num_selected, **options) -> (experts [T, K], weights [T, K])
RouterFunction = Callable[..., tuple[Tensor, Tensor]]

_PER_TOKEN = ("coins", "token_ids")
_ABSENT: dict[str, Any] = {"num_groups": 1, "groups_kept": 1, "scale": 1.0, "capacity": None}


@dataclass
class _Call:
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


def check_router(
    fn: RouterFunction,
    rule: str = "mixtral",
    *,
    ties: bool = True,
    dtype: torch.dtype = torch.float64,
    padding: bool = False,
    report: bool = False,
    **options: Any,
) -> Report:
    """Return the Report of holding a router to its rule: which experts, which weights, and their gradients.

    Args: `fn(logits [T, E], num_selected, **what the rule takes)` returns (experts [T, K] integers, weights
    [T, K]), the K places of a token in any order; rules whose tokens may use fewer experts read -1, or a
    weight of 0, as an empty place; "expert_choice" returns (tokens [E, C], weights [E, C]). docs/testing.md
    has the table; RULES[rule] says `takes` and `meaning`. `ties` False leaves out the cases where equal
    scores must choose the lowest id; `dtype`, of the logits, sets the tolerance (fp64 1e-12, fp32 1e-5).
    `padding` True adds calls with `mask=` [T] bool, whose False tokens must get nothing and change nothing.
    `report` True returns what differs instead of raising it. `options` fixes what a router has only one
    of (num_selected, num_experts, num_groups, groups_kept, scale, p, capacity): the cases of another value
    are left out, and the function is not given that keyword (num_selected it always is).
    Raises: Mismatch, with the first difference and what would explain all, unless `report`; UserError for an
    unknown rule or option, and where the fixed options leave no case.
    """
    if rule not in RULES:
        raise UserError(f"rule {rule!r} is unknown{did_you_mean(rule, RULES)}; allowed: {', '.join(RULES)}")
    wanted = RULES[rule]
    check_options(rule, wanted, options)
    calls = [replace(call) for call in _calls(rule, tuple(options.items())) if ties or not call.tie]
    if padding:
        calls += [padded for call in calls if (padded := _padded(call, wanted)) is not None]
    if not calls:
        raise UserError(f"no case of rule {rule!r} has {options}; allowed: values that its experts can have")
    log = Log(f"router against {rule}", report)
    for call in calls:
        log.run(call.name, partial(_hold, fn, wanted, call, options, dtype))
        if wanted.learns and call.expected:
            log.run(call.name, partial(_hold_gradient, fn, wanted, call, options, dtype))
    return log.finish(_explained(wanted, calls, log, TOLERANCE[dtype]))


@lru_cache(maxsize=64)
def _calls(name: str, options: tuple[tuple[str, Any], ...]) -> tuple[_Call, ...]:
    """Return the calls of a rule; the same ones serve every check."""
    rule, fixed = RULES[name], dict(options)
    calls = (*_by_hand(name, rule, fixed), *_drawn(name, rule, fixed))
    return tuple(replace(call, slopes=_slopes(rule, call) if rule.learns else None) for call in calls)


def _by_hand(name: str, rule: Rule, fixed: Mapping[str, Any]) -> Iterator[_Call]:
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
        tensors = {key: torch.tensor(value) for key, value in given.items() if isinstance(value, tuple)}
        tensors = {key: v.double() if v.is_floating_point() else v for key, v in tensors.items()}
        logits = torch.tensor(case.rows, dtype=torch.float64)
        expected = [{e: factor * weight for e, weight in token.items()} for token in case.expected]
        yield _Call(
            f"{name}, {case.name}", logits, case.num_selected, {**given, **tensors}, expected, case.tie
        )


def _drawn(name: str, rule: Rule, fixed: Mapping[str, Any]) -> Iterator[_Call]:
    """Yield random calls."""
    for draw in draws(rule, fixed):
        expected = _numbers(rule.slow(_rows(draw.logits), draw.num_selected, draw.options))
        yield _Call(f"{name}, {draw.name}", draw.logits, draw.num_selected, draw.options, expected)


def _rows(logits: Tensor) -> list[list[Tensor]]:
    return [list(row) for row in logits]


def _numbers(weights: list[dict[int, Tensor]]) -> list[dict[int, float]]:
    return [{e: weight.item() for e, weight in token.items()} for token in weights]


def _padded(call: _Call, rule: Rule) -> _Call | None:
    """Return the same call with every third token padding, of large logits; None where ties would decide."""
    if call.logits.shape[0] < 3 or call.tie:
        return None
    mask = torch.arange(call.logits.shape[0]) % 3 != 1
    logits = torch.where(mask.unsqueeze(-1), call.logits, 50 - 9 * call.logits)
    real = {key: value[mask] if key in _PER_TOKEN else value for key, value in call.options.items()}
    if not is_clear(rule, logits[mask], call.num_selected, real, torch.Generator().manual_seed(0)):
        return None
    slow = iter(_numbers(rule.slow(_rows(logits[mask]), call.num_selected, real)))
    expected = [next(slow) if kept else {} for kept in mask.tolist()]
    return _Call(f"{call.name}, with padding", logits, call.num_selected, call.options, expected, mask=mask)


def _run(
    fn: RouterFunction, rule: Rule, call: _Call, fixed: Mapping[str, Any], logits: Tensor
) -> tuple[list[list[int]], Tensor]:
    """Return what the function chooses, as lists, and its weights; their shapes checked."""
    options = {key: value for key, value in call.options.items() if key not in fixed}
    options = {
        key: value.to(logits.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in options.items()
    }
    if call.mask is not None:
        options["mask"] = call.mask
    experts, weights = fn(logits, call.num_selected, **options)
    one, other = tuple(experts.shape), tuple(weights.shape)
    first = logits.shape[1] if rule.by_expert else logits.shape[0]
    shape = (first, call.num_selected)
    fits = one == shape if not (rule.by_expert or rule.open_places) else len(one) == 2 and one[0] == first
    if not fits or one != other:
        told = f"({first}, any number)" if rule.by_expert or rule.open_places else str(shape)
        raise Mismatch(call.name, f"shapes {one}, {other}", f"{told} twice")
    return experts.tolist(), weights


def _hold(fn: RouterFunction, rule: Rule, call: _Call, fixed: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Compare experts and weights of every token."""
    places, weights = _run(fn, rule, call, fixed, call.logits.to(dtype))
    values = weights.double().tolist()
    taken: list[list[tuple[int, float]]] = [[] for _ in call.expected]
    for i, (ids, numbers) in enumerate(zip(places, values, strict=True)):
        for j, weight in zip(ids, numbers, strict=True):
            t, e = (j, i) if rule.by_expert else (i, j)
            empty = j < 0 or (weight == 0 and (rule.open_places or rule.by_expert or not call.expected[t]))
            if not empty:
                taken[t].append((e, weight))
    call.found = [dict(token) for token in taken]
    for t, (token, expected) in enumerate(zip(taken, call.expected, strict=True)):
        ids = [e for e, _ in token]
        if sorted(ids) != sorted(expected):
            raise Mismatch(call.name, f"token {t} went to experts {ids}", str(list(expected)))
        for e, weight in expected.items():
            found = dict(token)[e]
            if not near(found, weight, TOLERANCE[dtype]):
                raise Mismatch(call.name, f"token {t} weighs expert {e} with {found:.9g}", f"{weight:.9g}")


def _hold_gradient(
    fn: RouterFunction, rule: Rule, call: _Call, fixed: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Compare the gradient of sum_e (1 + e) w_e with that of the slow definition."""
    logits = call.logits.to(dtype).requires_grad_()
    places, weights = _run(fn, rule, call, fixed, logits)
    if not weights.requires_grad:
        raise Mismatch(call.name, "the weights carry no gradient, so the router cannot learn")
    ids = torch.tensor(places, dtype=torch.int64).reshape(weights.shape)
    factors = ids + 1
    if rule.by_expert:
        factors = torch.where(ids >= 0, torch.arange(len(places)).unsqueeze(-1) + 1, 0)
    (found,) = torch.autograd.grad((weights * factors).sum(), logits)
    wanted = _slopes(rule, call) if call.slopes is None else call.slopes
    kept = torch.ones(len(call.expected), dtype=torch.bool) if call.mask is None else call.mask
    # Of real tokens alone: what a padded token's weights would do to it is used by nobody.
    for t in kept.nonzero().flatten().tolist():
        for j in range(wanted.shape[1]):
            value, slope = found[t, j].item(), wanted[t, j].item()
            if not near(value, slope, TOLERANCE[dtype] * 10 * wanted.shape[1]):
                raise Mismatch(call.name, f"token {t}, gradient of logit {j} is {value:.9g}", f"{slope:.9g}")


def _slopes(rule: Rule, call: _Call) -> Tensor:
    """Return the gradient of sum_e (1 + e) w_e by the slow definition."""
    exact = call.logits.clone().requires_grad_()
    kept = torch.ones(exact.shape[0], dtype=torch.bool) if call.mask is None else call.mask
    options = {k: v[kept] if k in _PER_TOKEN else v for k, v in call.options.items()}
    total = 0 * exact.sum()
    for token in rule.slow(_rows(exact[kept]), call.num_selected, options):
        for e, weight in token.items():
            total = total + (1 + e) * weight
    return torch.autograd.grad(total, exact)[0]


def _explained(rule: Rule, calls: list[_Call], log: Log, tolerance: float) -> list[str]:
    """Return the known mistakes that give what was found in every case, and whether ties alone differ."""
    ran = [call for call in calls if call.found is not None and call.mask is None]
    tied = {call.name for call in calls if call.tie}
    if not ran or not log.differences:
        return []
    if all(difference.case in tied for difference in log.differences):
        return ["equal scores alone: the order among them is another than the lowest id first"]
    if all(_same(rule.slow, call, tolerance) for call in ran):
        return []
    where = (
        "" if len(ran) == sum(call.mask is None for call in calls) else " (in the cases that did not raise)"
    )
    for ignored, also in ((set(), ""), (tied, "; and ties are broken in another order")):
        told = [
            f"{what}{also}{where}"
            for what, slow in rule.mistakes.items()
            if all(_same(slow, call, tolerance) for call in ran if call.name not in ignored)
        ]
        if told:
            return told
    return []


def _same(slow: Slow, call: _Call, tolerance: float) -> bool:
    """Whether the function's choices and weights are those of another definition."""
    rows = _rows(call.logits)
    expected = slow(rows, call.num_selected, call.options)
    for row, found, wanted in zip(rows, call.found or [], expected, strict=True):
        if isinstance(slow, Choice) and slow.losing == 0 and len(found) == call.num_selected:
            # Losing experts tie at 0, and any of them may have been taken.
            order = slow.order(row, **call.options)
            if sorted(order[e] for e in found) == sorted(order[e] for e in wanted):
                wanted = slow.weigh(row, list(found), **call.options)
        if sorted(found) != sorted(wanted):
            return False
        if not all(near(found[e], weight.item(), tolerance) for e, weight in wanted.items()):
            return False
    return True
