"""gatewright.testing's losses: the toolkit's own pass, and wrong ones are named with their factor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import Assignment, Stats, make_plan
from gatewright.parts import losses as toolkit
from gatewright.parts.record import record_call
from gatewright.parts.router import Routed
from gatewright.testing import CONVENTIONS, LOSSES, Mismatch, Report, check_balance


def own(loss: str, scores: str = "softmax") -> Callable[..., Tensor]:
    """Return the toolkit's loss as a function of logits and experts, of one layer or of several."""

    def run(logits: Tensor, experts: Tensor, mask: Tensor | None, **options: int) -> Tensor:
        if logits.dim() == 2:
            logits, experts = logits.unsqueeze(0), experts.unsqueeze(0)
        length = options.pop("sequence_length", None)
        devices = options.get("num_devices", 1)
        stats = Stats()
        for i, (rows, ids) in enumerate(zip(logits, experts, strict=True)):
            shares = rows.softmax(dim=1) if scores == "softmax" else rows.sigmoid()
            shares = shares / shares.sum(dim=1, keepdim=True)
            ids = ids if mask is None else torch.where(mask.unsqueeze(-1), ids, -1)
            on = torch.div(ids, rows.shape[1] // devices, rounding_mode="floor")
            received = torch.stack([(on == d).any(dim=1).sum() for d in range(devices)])
            weights, sums = shares.gather(1, ids.clamp(min=0)), {"device_counts": received}
            found = Assignment(ids, weights, rows.shape[1], sums=sums)
            record = record_call(
                Routed(rows, shares, shares, found), make_plan(found), mask, length, capture=False
            )
            stats = stats | Stats({f"layers.{i}": record})
        return toolkit.LOSSES[loss](stats, **options)

    return run


@pytest.mark.parametrize("loss", LOSSES)
def test_the_toolkits_losses_pass(loss: str):
    found = check_balance(own(loss), loss, over_layers=True)
    assert found.passed == found.cases > 10
    assert check_balance(own(loss), loss, dtype=torch.float32).ok


def test_normalised_sigmoids_pass():
    assert check_balance(own("sequence_balance", "sigmoid"), "sequence_balance", scores="sigmoid").ok
    assert not check_balance(own("sequence_balance"), "sequence_balance", scores="sigmoid", report=True).ok


def found_by(fn: Callable[..., Tensor], loss: str, **options: object) -> Report:
    found = check_balance(fn, loss, report=True, **options)  # type: ignore[arg-type]
    assert not found.ok
    return found


def written(
    factor: Callable[[int, int], float] = lambda e, k: e / k,
    masked: bool = True,
    twice: bool = False,
    first: bool = False,
    again: bool = False,
) -> Callable[..., Tensor]:
    """Return the balance loss as libraries write it, with what can be wrong."""

    def run(logits: Tensor, experts: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens, num_experts = logits.shape
        places = experts.shape[1]
        real = torch.ones(tokens) if mask is None or not masked else mask
        real = real.to(logits.dtype).unsqueeze(-1)
        scores = logits.softmax(dim=1)
        experts = scores.topk(places, dim=1)[1] if again else experts
        experts = experts[:, :1] if first else experts
        loads = torch.nn.functional.one_hot(experts, num_experts).sum(dim=1)
        scores = scores.softmax(dim=1) if twice else scores
        total = real.sum().clamp(min=1)
        f, p = (loads * real).sum(dim=0) / total, (scores * real).sum(dim=0) / total
        return factor(num_experts, 1 if first else places) * (f * p).sum()

    return run


def z_of(probabilities: bool) -> Callable[..., Tensor]:
    def run(logits: Tensor, experts: Tensor, mask: Tensor | None = None) -> Tensor:
        values = logits.softmax(dim=1) if probabilities else logits
        real = torch.ones(logits.shape[0]) if mask is None else mask.to(logits.dtype)
        return (values.logsumexp(dim=1) ** 2 * real).sum() / real.sum().clamp(min=1)

    return run


def unbiased(logits: Tensor, experts: Tensor, mask: Tensor | None = None) -> Tensor:
    """Importance with the sample variance."""
    scores = logits.softmax(dim=1) * (1 if mask is None else mask.unsqueeze(-1))
    sums = scores.sum(dim=0)
    return sums.var() / sums.mean().clamp(min=1e-30) ** 2


def pooled(logits: Tensor, experts: Tensor, mask: Tensor | None = None) -> Tensor:
    """All layers' tokens as one, f summing to K: the loss of transformers."""
    many = None if mask is None else mask.repeat(logits.shape[0])
    return written(lambda e, k: e)(logits.flatten(0, 1), experts.flatten(0, 1), many)


@pytest.mark.parametrize(
    ("fn", "loss", "told"),
    [
        (written(lambda e, k: e), "balance", "every value is K times the defining one: f sums to K"),
        (written(lambda e, k: e / k**2), "balance", "every value is 1 / K times"),
        (written(lambda e, k: 1 / k), "balance", "every value is 1 / E times the defining one: the factor E"),
        (written(lambda e, k: 1 / (e * k)), "balance", "every value is 1 / E^2 times"),
        (written(lambda e, k: 0.7 * e / k), "balance", "every value is 0.7 times"),
        (written(masked=False), "balance", "padding is counted"),
        (written(twice=True), "balance", "P is a softmax of scores, not of logits"),
        (written(lambda e, k: e, twice=True), "balance", "of logits; every value is K times"),
        (written(first=True), "balance", "f counts first choices only"),
        (written(again=True), "balance", "f counts the highest logits, not the choices"),
        (
            lambda x, i, m, sequence_length: (
                own("gshard")(x, i, m, sequence_length=sequence_length) / x.shape[1] ** 2
            ),
            "gshard",
            "GShard as printed, as in fairscale (convention='gshard_printed')",
        ),
        (z_of(True), "z", "it is computed from probabilities, not from logits"),
        (unbiased, "importance", "the unbiased variance, as in Tutel (convention='unbiased_variance')"),
    ],
)
def test_a_wrong_loss_is_found_and_named(fn: Callable[..., Tensor], loss: str, told: str):
    (line,) = found_by(fn, loss).diagnosis
    assert told in line
    with pytest.raises(Mismatch):
        check_balance(fn, loss)


def test_layers_are_averaged():
    found = found_by(pooled, "balance", over_layers=True, convention="transformers")
    assert any(
        "two layers whose imbalances cancel: 3/2 each: the value is 1" in str(d) for d in found.differences
    )
    (line,) = found.diagnosis
    assert line.startswith("layers are pooled before the product: their imbalances cancel; every value is K")

    def summed(logits: Tensor, experts: Tensor, mask: Tensor | None) -> Tensor:
        return own("balance")(logits, experts, mask) * logits.shape[0]

    (line,) = found_by(summed, "balance", over_layers=True).diagnosis
    assert line.startswith("every value is L times the defining one")
    assert check_balance(summed, "balance", over_layers=True, convention="summed_over_layers").ok


def test_a_convention_is_held_to():
    for name in ("transformers", "flaxformer", "sum_to_k"):
        assert check_balance(written(lambda e, k: e), "balance", convention=name).ok
    found = found_by(written(), "balance", convention="transformers")
    # The values are right in our own convention: nothing else is wrong with them.
    assert found.diagnosis == ("every value is the defining one: it has the factor 1",)
    assert (
        check_balance(unbiased, "importance", convention="unbiased_variance", padding=False).differences == ()
    )


def test_what_does_not_take_part_can_be_left_out():
    assert check_balance(written(masked=False), "balance", padding=False).ok
    assert check_balance(written(again=True), "balance", chooses=True).ok


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        (lambda x, i, m: written()(x.detach(), i, m), "carries no gradient, so it teaches nothing"),
        (
            lambda x, i, m: (written()(x, i, m) + written()(x, i, m).detach()) / 2,
            "the gradient of token",
        ),
        (lambda x, i, m: written()(x, i, m) + 0 * x.sum(), None),
        (
            lambda x, i, m: written()(x, i, m) * (1 if m is None or m.any() else torch.nan),
            "padding alone: the value is nan",
        ),
        (lambda x, i, m: x.sum(dim=0), r"returned \(4,\) numbers; expected a single number"),
        (
            lambda x, i, m: written()(x, i, m) + (0 if m is None else 1e-3 * x[1].detach().max()),
            "what stands in padding changes the value to",
        ),
        (
            lambda x, i, m: written()(x, i, m) * (1 + 1e-3 * float(x.shape[0] > 4 and i[0, 0] > i[-1, 0])),
            "another order of tokens changes the value",
        ),
        (
            lambda x, i, m: written()(x, i, m) * (1 + 1e-3 * float(i.shape[1] == 3 and bool(i[0, 0] > 3))),
            "another order of experts changes the value",
        ),
    ],
)
def test_gradients_and_invariances_are_checked(fn: Callable[..., Tensor], told: str | None):
    if told is None:
        assert check_balance(fn, "balance").ok
        return
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(str(found_by(fn, "balance")))


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="loss 'balanced' is unknown; did you mean 'balance'"):
        check_balance(written(), "balanced")
    with pytest.raises(
        UserError, match="convention 'tranformers' of loss 'balance' is unknown; did you mean"
    ):
        check_balance(written(), convention="tranformers")
    with pytest.raises(UserError, match=r"convention 'transformers' of loss 'z' is unknown; allowed: summed"):
        check_balance(z_of(False), "z", convention="transformers")
    with pytest.raises(UserError, match="scores 'relu' are unknown; allowed: softmax, sigmoid"):
        check_balance(written(), scores="relu")
    assert all(loss in LOSSES for losses in CONVENTIONS.values() for loss in losses)
