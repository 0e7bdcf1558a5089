"""The cases that the parts are tested with, for anybody's router and experts: by hand, then slow and random.

    check_router(my_router, rule="mixtral")
    check_experts(my_experts, activation="swiglu")

Each returns None, or raises Mismatch (an AssertionError) that names the case and says what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import check_activation, is_gated

RouterFunction = Callable[[Tensor, int], tuple[Tensor, Tensor]]
ExpertsFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Mismatch(AssertionError):
    """A case whose result is not the expected one; the text names both."""


@dataclass(frozen=True)
class Case:
    """One token: the exponentials of its logits, K, and the weights that must come of it, by expert id."""

    name: str
    powers: tuple[float, ...]
    num_selected: int
    expected: dict[int, float]
    tie: bool = False


# The softmax of a case is powers / sum(powers).
_RAW = (
    Case("top 1 of 2, 5, 1, 2 (sum 10)", (2, 5, 1, 2), 1, {1: 5 / 10}),
    Case("top 2 of 3, 1, 5, 2 (sum 11)", (3, 1, 5, 2), 2, {2: 5 / 11, 0: 3 / 11}),
    Case("all of 2, 5, 1 (sum 8)", (2, 5, 1), 3, {1: 5 / 8, 0: 2 / 8, 2: 1 / 8}),
    Case("a single expert", (7,), 1, {0: 1.0}),
    Case("four equal scores: the lowest ids", (1, 1, 1, 1), 2, {0: 1 / 4, 1: 1 / 4}, tie=True),
    Case("a tie for the last place: the lowest id", (2, 1, 4, 2), 2, {2: 4 / 9, 0: 2 / 9}, tie=True),
)
_SELECTED = (
    Case("top 2 of 3, 1, 5, 2: 5 and 3 share 1", (3, 1, 5, 2), 2, {2: 5 / 8, 0: 3 / 8}),
    Case("top 3 of 1, 2, 3, 4", (1, 2, 3, 4), 3, {3: 4 / 9, 2: 3 / 9, 1: 2 / 9}),
    Case("all of 2, 5, 1", (2, 5, 1), 3, {1: 5 / 8, 0: 2 / 8, 2: 1 / 8}),
    Case("four equal scores: the lowest ids", (1, 1, 1, 1), 2, {0: 1 / 2, 1: 1 / 2}, tie=True),
    Case("a tie for the last place: the lowest id", (2, 1, 4, 2), 2, {2: 4 / 6, 0: 2 / 6}, tie=True),
)
# Rule -> (its hand-worked cases, whether the weights are normalised over the chosen, the largest K or none).
RULES: dict[str, tuple[tuple[Case, ...], bool, int | None]] = {
    "switch": (tuple(case for case in _RAW if case.num_selected == 1), False, 1),
    "olmoe": (_RAW, False, None),
    "mixtral": (_SELECTED, True, None),
}


def check_router(
    fn: RouterFunction, rule: str = "mixtral", *, ties: bool = True, dtype: torch.dtype = torch.float64
) -> None:
    """Hold a token-choice router against its rule: which experts, which weights, and the weights' gradients.

    Args: `fn(logits [T, E], num_selected)` returns (experts [T, K] integers, weights [T, K]), the K places
    in any order; `rule` is "switch" (top 1, raw score: Switch eq 1-3), "olmoe" (top K, raw scores: OLMoE eq
    1) or "mixtral" (softmax over the K chosen logits: Mixtral section 2.1); `ties` False leaves out the
    cases where equal scores must choose the lowest id; `dtype`, of the logits, sets the tolerance (fp64
    1e-12, fp32 1e-5).
    Raises: Mismatch; UserError for an unknown rule.
    """
    if rule not in RULES:
        raise UserError(f"rule {rule!r} is unknown{did_you_mean(rule, RULES)}; allowed: {', '.join(RULES)}")
    cases, normalised, most = RULES[rule]
    for case in cases:
        if ties or not case.tie:
            logits = torch.tensor([[math.log(power) for power in case.powers]], dtype=torch.float64)
            _check_token(f"{rule}, {case.name}", fn, logits.to(dtype), case.num_selected, [case.expected])
    draw = torch.Generator().manual_seed(0)
    for num_tokens, num_experts in ((7, 5), (3, 64), (1, 2), (0, 4)):
        for num_selected in range(2 if normalised else 1, min(num_experts, most or 9) + 1):
            # In steps of 1/8: distinct per token, so no tie, and exact in every dtype.
            logits = torch.rand(num_tokens, num_experts, generator=draw).argsort(dim=1) / 8 - 2.5
            expected = [_slow_weights(row, num_selected, normalised) for row in logits.tolist()]
            name = f"{rule}, {num_tokens} random tokens, K = {num_selected} of {num_experts}"
            _check_token(name, fn, logits.to(dtype), num_selected, expected)
            _check_router_gradient(name, fn, logits.to(dtype), num_selected, normalised)


def _slow_weights(logits: list[float], num_selected: int, normalised: bool) -> dict[int, float]:
    """Return {expert: weight} of one token, by the definition."""
    chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:num_selected]
    total = sum(math.exp(logits[e]) for e in (chosen if normalised else range(len(logits))))
    return {e: math.exp(logits[e]) / total for e in chosen}


def _call_router(
    name: str, fn: RouterFunction, logits: Tensor, num_selected: int
) -> tuple[list[list[int]], Tensor]:
    """Return the router's experts as lists, and its weights; their shapes checked."""
    experts, weights = fn(logits, num_selected)
    shape = (logits.shape[0], num_selected)
    if tuple(experts.shape) != shape or tuple(weights.shape) != shape:
        raise Mismatch(
            f"{name}: shapes {tuple(experts.shape)}, {tuple(weights.shape)}; expected {shape} twice"
        )
    return experts.tolist(), weights


def _check_token(
    name: str, fn: RouterFunction, logits: Tensor, num_selected: int, expected: list[dict[int, float]]
) -> None:
    experts, weights = _call_router(name, fn, logits, num_selected)
    for t, (ids, values) in enumerate(zip(experts, weights.double().tolist(), strict=True)):
        found = dict(zip(ids, values, strict=True))
        if sorted(ids) != sorted(expected[t]):
            raise Mismatch(f"{name}: token {t} went to experts {ids}; expected {list(expected[t])}")
        for e, weight in expected[t].items():
            if not abs(found[e] - weight) <= _TOLERANCE[logits.dtype]:
                raise Mismatch(
                    f"{name}: token {t} weighs expert {e} with {found[e]:.9g}; expected {weight:.9g}"
                )


def _check_router_gradient(
    name: str, fn: RouterFunction, logits: Tensor, num_selected: int, normalised: bool
) -> None:
    """Compare the gradient of sum_e (1 + e) w_e with the softmax's own, w_e (delta_ej - w_j)."""
    logits = logits.detach().requires_grad_()
    experts, weights = _call_router(name, fn, logits, num_selected)
    if not weights.requires_grad:
        raise Mismatch(f"{name}: the weights carry no gradient, so the router cannot learn")
    factors = torch.tensor(experts, dtype=weights.dtype).reshape(weights.shape) + 1
    (found,) = torch.autograd.grad((weights * factors).sum(), logits)
    for t, row in enumerate(logits.detach().double().tolist()):
        chosen = _slow_weights(row, num_selected, normalised)
        field = chosen if normalised else _slow_weights(row, len(row), False)
        for j in range(len(row)):
            slope = sum((1 + e) * weight * ((e == j) - field.get(j, 0.0)) for e, weight in chosen.items())
            if not abs(found[t, j].item() - slope) <= _TOLERANCE[logits.dtype] * 10 * len(row):
                value = found[t, j].item()
                raise Mismatch(
                    f"{name}: token {t}, gradient of logit {j} is {value:.9g}; expected {slope:.9g}"
                )


def check_experts(
    fn: ExpertsFunction, activation: str = "swiglu", *, dtype: torch.dtype = torch.float64
) -> None:
    """Hold an expert layer against a loop over tokens and choices: its output and all four gradients.

    Equation: y_t = sum_k weights[t, k] w_down[e] act(w_in[e] x_t), e = experts[t, k]; a place of -1 adds 0.
    Args: `fn(x [T, D], experts [T, K] int64, weights [T, K], w_in [E, F or 2F, D], w_down [E, D, F])`
    returns y [T, D]; gated activations take 2F rows, gate first; `dtype` is that of all tensors and sets
    the tolerance, relative to the largest number of each tensor (fp64 1e-12, fp32 1e-5). Cases: empty
    experts, all tokens to one, K = E, E = 1, no tokens, empty places, widths that are not multiples of 4.
    Raises: Mismatch; UserError for an unknown activation.
    """
    check_activation(activation)
    everything = [[1, 0, 2], [0, 2, 1]]
    for name, num_experts, width, hidden, places in (
        ("empty experts", 6, 5, 3, [[1, 4], [4, 2], [1, 2]]),
        ("all tokens to one expert", 3, 8, 4, [[2], [2], [2], [2]]),
        ("K = E", 3, 3, 7, everything),
        ("one expert", 1, 4, 4, [[0], [0]]),
        ("empty places", 4, 5, 5, [[1, -1], [-1, -1], [3, 1]]),
        ("no tokens", 2, 4, 3, []),
        ("wide and aligned", 4, 16, 32, [[0, 1], [3, 2], [1, 0], [1, 3], [2, 0]]),
    ):
        rows = hidden * (2 if is_gated(activation) else 1)
        draw = torch.Generator().manual_seed(1)
        experts = torch.tensor(places, dtype=torch.int64).reshape(
            len(places), len(places[0]) if places else 1
        )
        shapes = (len(places), width), experts.shape, (num_experts, rows, width), (num_experts, width, hidden)
        given = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
        exact = [leaf.detach().double().requires_grad_() for leaf in given]
        y = fn(given[0], experts, *given[1:])
        expected = _slow_experts(activation, experts, *exact)
        label = f"{activation}, {name}"
        _check_near(f"{label}: y", y, expected)
        direction = torch.randn(expected.shape, generator=draw).to(dtype)
        found = torch.autograd.grad(y, given, direction.to(y.dtype), allow_unused=True)
        wanted = torch.autograd.grad(expected, exact, direction.double())
        for what, one, other in zip(("x", "weights", "w_in", "w_down"), found, wanted, strict=True):
            if one is None and other.any():
                raise Mismatch(f"{label}: no gradient for {what}")
            if one is not None:
                _check_near(f"{label}: gradient of {what}", one, other)


def _slow_experts(
    activation: str, experts: Tensor, x: Tensor, weights: Tensor, w_in: Tensor, w_down: Tensor
) -> Tensor:
    """Return y by the definition; every input takes part, so that what nothing reaches has the gradient 0."""
    rows = [x[t] * 0 + 0 * (weights.sum() + w_in.sum() + w_down.sum()) for t in range(x.shape[0])]
    for t, ids in enumerate(experts.tolist()):
        for k, e in enumerate(ids):
            if e >= 0:
                hidden = _activated(activation, w_in[e] @ x[t])
                rows[t] = rows[t] + weights[t, k] * (w_down[e] @ hidden)
    return torch.stack(rows) if rows else x * 0 + 0 * (weights.sum() + w_in.sum() + w_down.sum())


def _activated(name: str, h: Tensor) -> Tensor:
    """Return the activation of one hidden vector, from its formula."""
    if name == "relu":
        return h * (h > 0)
    if name == "gelu":
        return h * (1 + torch.erf(h / math.sqrt(2))) / 2
    gate, up = h[: len(h) // 2], h[len(h) // 2 :]
    return (_activated("gelu", gate) if name == "geglu" else gate / (1 + torch.exp(-gate))) * up


def _check_near(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise Mismatch(f"{name} has the shape {tuple(found.shape)}; expected {tuple(expected.shape)}")
    if not found.numel():
        return
    error = (found.double() - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-2)
    if not error <= _TOLERANCE[found.dtype] * scale:
        raise Mismatch(
            f"{name} is off by {error / scale:.3g} of its largest number; "
            f"allowed for {found.dtype}: {_TOLERANCE[found.dtype]:.0e}"
        )
