"""gatewright.testing passes what is right and catches what is wrong, in words that say what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels import ACTIVATIONS, ExpertWeights, activate, expert_mlp, runnable_backends
from gatewright.parts import Assignment, make_plan, softmax_scores, token_choice
from gatewright.testing import RULES, Mismatch, check_experts, check_router

FORMS = {"switch": ("raw",), "olmoe": ("raw",), "mixtral": ("renormalised", "softmax_selected")}


def router(form: str) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Return the toolkit's own token choice as a function."""

    def choose(logits: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
        chosen = token_choice(logits, softmax_scores(logits), num_selected, form)  # type: ignore[arg-type]
        return chosen.experts, chosen.weights

    return choose


def experts(activation: str, backend: str) -> Callable[..., Tensor]:
    """Return the toolkit's own experts as a function."""

    def run(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
        plan = make_plan(Assignment(ids, weights, w_in.shape[0]))
        return expert_mlp(x, plan, weights, ExpertWeights(w_in, w_down, activation), backend)

    return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rule", "form"), [(rule, form) for rule in RULES for form in FORMS.get(rule, ())])
def test_the_toolkits_rules_pass(rule: str, form: str, dtype: torch.dtype):
    check_router(router(form), rule, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", runnable_backends())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_toolkits_experts_pass(activation: str, backend: str, dtype: torch.dtype):
    check_experts(experts(activation, backend), activation, dtype=dtype)


def reversed_places(logits: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
    """Mixtral with its places in rising order, which is as good."""
    ids, weights = router("softmax_selected")(logits, num_selected)
    return ids.flip(1), weights.flip(1)


def highest_id_first(logits: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
    """Mixtral that breaks ties towards the highest id."""
    ids, weights = router("softmax_selected")(logits.flip(1), num_selected)
    return logits.shape[1] - 1 - ids, weights


def test_the_order_of_places_is_free():
    check_router(reversed_places, "mixtral")


def test_ties_can_be_left_out():
    with pytest.raises(
        Mismatch, match=r"mixtral, four equal scores: .* token 0 went to experts \[3, 2\]; expected"
    ):
        check_router(highest_id_first, "mixtral")
    check_router(highest_id_first, "mixtral", ties=False)


def detached(logits: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
    """Mixtral whose router cannot learn."""
    return router("softmax_selected")(logits.detach(), num_selected)


def half_gradient(logits: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
    """Mixtral with half the gradient."""
    ids, weights = router("softmax_selected")(logits, num_selected)
    return ids, (weights + weights.detach()) / 2


@pytest.mark.parametrize(
    ("fn", "rule", "said"),
    [
        (router("raw"), "mixtral", r"weighs expert 2 with 0\.4545\d+; expected 0\.625"),
        (router("renormalised"), "olmoe", "the router gets no gradient"),
        (detached, "mixtral", "the weights carry no gradient, so the router cannot learn"),
        (half_gradient, "mixtral", r"token 0, gradient of logit \d is .*; expected"),
        (
            lambda logits, k: router("raw")(logits, 1),
            "olmoe",
            r"shapes \(1, 1\), \(1, 1\); expected \(1, 2\)",
        ),
    ],
)
def test_a_wrong_router_is_caught(fn, rule: str, said: str):
    with pytest.raises((Mismatch, UserError), match=said):
        check_router(fn, rule)


def halves_swapped(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """SwiGLU that takes the second half for the gate."""
    swapped = torch.cat(w_in.chunk(2, dim=1)[::-1], dim=1)
    return experts("swiglu", "reference")(x, ids, weights, swapped, w_down)


def last_for_empty(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """An index of -1 used as it is."""
    hidden = activate("swiglu", torch.einsum("efd,td->tef", w_in, x))
    out = torch.einsum("edf,tef->ted", w_down, hidden)
    picked = torch.take_along_dim(out, (ids % w_in.shape[0]).unsqueeze(-1), dim=1)
    return (picked * weights.unsqueeze(-1)).sum(dim=1)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (halves_swapped, "swiglu, empty experts: y is off by"),
        (last_for_empty, "swiglu, empty places: y is off by"),
        (
            lambda x, ids, weights, *w: experts("swiglu", "grouped")(x, ids, weights.detach(), *w),
            "empty experts: no gradient for weights",
        ),
        (
            lambda x, ids, weights, a, b: experts("swiglu", "grouped")(
                x, ids, weights, a, (b + b.detach()) / 2
            ),
            "empty experts: gradient of w_down is off by 0.5",
        ),
        (lambda x, *rest: x[:, :1], r"y has the shape \(3, 1\); expected \(3, 5\)"),
    ],
)
def test_wrong_experts_are_caught(fn, said: str):
    with pytest.raises(Mismatch, match=said):
        check_experts(fn, "swiglu")


def test_unknown_names_are_refused():
    with pytest.raises(
        UserError, match=r"rule 'mixtrel' is unknown; did you mean 'mixtral'\?; allowed: switch, olmoe"
    ):
        check_router(router("raw"), "mixtrel")
    with pytest.raises(UserError, match="activation 'silu' is unknown"):
        check_experts(experts("relu", "reference"), "silu")
