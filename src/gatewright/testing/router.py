"""Hold anybody's router to its rule: cases worked by hand, then the slow definition on random logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.testing.calls import Call, calls_of, kept_tokens, padded, rows_of, slopes_of
from gatewright.testing.draws import check_options
from gatewright.testing.report import TOLERANCE, Log, Mismatch, Report, near
from gatewright.testing.rule import Rule
from gatewright.testing.rules import RULES
from gatewright.testing.slow_routers import Choice, Slow
from gatewright.testing.sums import Summed, explained_sums, hold_sums

# fn(logits [T, E], num_selected, **options) -> (experts [T, K], weights [T, K]) or (experts, weights, sums)
RouterFunction = Callable[..., Any]


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
    weight of 0, as an empty place; "expert_choice" returns (tokens [E, C], weights [E, C]). Where the rule
    says something to a loss, the function may return that as a third, {name: numbers}; what is there is held
    too. docs/testing.md has the table; RULES[rule] says `takes` and `meaning`. `ties` False leaves out the
    cases where equal scores must choose the lowest id; `dtype`, of the logits, sets the tolerance (fp64
    1e-12, fp32 1e-5).
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
    calls = [replace(call) for call in calls_of(rule, tuple(options.items())) if ties or not call.tie]
    if padding:
        calls += [other for call in calls if (other := padded(call, wanted)) is not None]
    if not calls:
        raise UserError(f"no case of rule {rule!r} has {options}; allowed: values that its experts can have")
    log = Log(f"router against {rule}", report)
    for call in calls:
        log.run(call.name, partial(_hold, fn, wanted, call, options, dtype))
        if wanted.learns and call.expected:
            log.run(call.name, partial(_hold_gradient, fn, wanted, call, options, dtype))
        if call.found_sums:
            log.run(f"{call.name}, sums", partial(_hold_sums, fn, wanted, call, options, dtype))
    return log.finish(_explained(wanted, calls, log, TOLERANCE[dtype]))


def _run(
    fn: RouterFunction, rule: Rule, call: Call, fixed: Mapping[str, Any], logits: Tensor
) -> tuple[list[list[int]], Tensor, Mapping[str, Tensor]]:
    """Return what the function chooses, as lists, its weights, their shapes checked, and its sums."""
    options = {key: value for key, value in call.options.items() if key not in fixed}
    options = {
        key: value.to(logits.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in options.items()
    }
    if call.mask is not None:
        options["mask"] = call.mask
    experts, weights, *more = fn(logits, call.num_selected, **options)
    one, other = tuple(experts.shape), tuple(weights.shape)
    first = logits.shape[1] if rule.by_expert else logits.shape[0]
    shape = (first, call.num_selected)
    fits = one == shape if not (rule.by_expert or rule.open_places) else len(one) == 2 and one[0] == first
    if not fits or one != other:
        told = f"({first}, any number)" if rule.by_expert or rule.open_places else str(shape)
        raise Mismatch(call.name, f"shapes {one}, {other}", f"{told} twice")
    return experts.tolist(), weights, more[0] if more and rule.sums is not None else {}


def _hold(fn: RouterFunction, rule: Rule, call: Call, fixed: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Compare experts and weights of every token."""
    places, weights, sums = _run(fn, rule, call, fixed, call.logits.to(dtype))
    call.found_sums = {name: list(map(float, value.reshape(-1).tolist())) for name, value in sums.items()}
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
    fn: RouterFunction, rule: Rule, call: Call, fixed: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Compare the gradient of sum_e (1 + e) w_e with that of the slow definition."""
    logits = call.logits.to(dtype).requires_grad_()
    places, weights, _ = _run(fn, rule, call, fixed, logits)
    if not weights.requires_grad:
        raise Mismatch(call.name, "the weights carry no gradient, so the router cannot learn")
    ids = torch.tensor(places, dtype=torch.int64).reshape(weights.shape)
    factors = ids + 1
    if rule.by_expert:
        factors = torch.where(ids >= 0, torch.arange(len(places)).unsqueeze(-1) + 1, 0)
    (found,) = torch.autograd.grad((weights * factors).sum(), logits)
    wanted = slopes_of(rule, call) if call.slopes is None else call.slopes
    kept = kept_tokens(call)
    # Of real tokens alone: what a padded token's weights would do to it is used by nobody.
    for t in kept.nonzero().flatten().tolist():
        for j in range(wanted.shape[1]):
            value, slope = found[t, j].item(), wanted[t, j].item()
            if not near(value, slope, TOLERANCE[dtype] * 10 * wanted.shape[1]):
                raise Mismatch(call.name, f"token {t}, gradient of logit {j} is {value:.9g}", f"{slope:.9g}")


def _hold_sums(
    fn: RouterFunction, rule: Rule, call: Call, fixed: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Compare what the function says to a loss."""
    logits = call.logits.to(dtype).requires_grad_()
    _, _, found = _run(fn, rule, call, fixed, logits)
    hold_sums(f"{call.name}, sums", found, logits, kept_tokens(call), call.sums, TOLERANCE[dtype])


def _explained(rule: Rule, calls: list[Call], log: Log, tolerance: float) -> list[str]:
    """Return the known mistakes that give what was found in every case, and whether ties alone differ."""
    ran = [call for call in calls if call.found is not None and call.mask is None]
    tied = {call.name for call in calls if call.tie}
    if not ran or not log.differences:
        return []
    if all(difference.case in tied for difference in log.differences):
        return ["equal scores alone: the order among them is another than the lowest id first"]
    if all(_same(rule.slow, call, tolerance) for call in ran):
        of_sums = [
            Summed(rows_of(call.logits), call.num_selected, call.options, call.found_sums)
            for call in ran
            if call.found_sums
        ]
        return explained_sums(rule, of_sums, tolerance)
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


def _same(slow: Slow, call: Call, tolerance: float) -> bool:
    """Whether the function's choices and weights are those of another definition."""
    rows = rows_of(call.logits)
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
