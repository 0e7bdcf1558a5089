"""Runs of the deep mixture: information by hand, both phases, errors, and what the gates are asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gatewright.data.images import PLACES, Pictures
from gatewright.errors import Diverged
from gatewright.experiments.deep_cases import Shifted
from gatewright.experiments.deep_runs import Recipe, error_of, gates_by_class, gates_by_place, learn
from gatewright.experiments.information import effective, entropy, information, known, shared
from gatewright.papers import get_paper

PAPER = get_paper("deep_moe")


def test_information_by_hand():
    independent = torch.tensor([[3.0, 1.0], [6.0, 2.0]])
    assert information(independent) == pytest.approx(0, abs=1e-12)
    # Each column has a row of its own: all of it is known, ln 2 nats.
    apart = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert (information(apart), known(apart), shared(apart)) == pytest.approx((math.log(2), 1, 1))
    # 2 2 0 4 of 8: rows even (ln 2), columns 1/4 and 3/4, cells 1/4, 1/4, 1/2.
    table = torch.tensor([[2.0, 2.0], [0.0, 4.0]])
    columns = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    expected = math.log(2) + columns - (2 * 0.25 * math.log(4) + 0.5 * math.log(2))
    assert information(table) == pytest.approx(expected)
    assert known(table) == pytest.approx(expected / math.log(2))
    assert shared(table) == pytest.approx(expected / columns)
    assert known(table.t()) == pytest.approx(expected / columns)
    # One expert does everything: there is nothing to know.
    assert known(torch.tensor([[4.0, 4.0], [0.0, 0.0]])) == 0
    assert effective(torch.tensor([7.0, 7.0, 7.0])) == pytest.approx(3)
    assert effective(torch.tensor([7.0, 0.0])) == pytest.approx(1)
    assert entropy(torch.tensor([1.0, 1.0, 2.0])) == pytest.approx(1.5 * math.log(2))


class Points:
    """Three classes on a plane, 40 cases to learn from, in the order of their first number."""

    width, num_classes = 2, 3

    def __init__(self) -> None:
        self.x = torch.linspace(-1, 1, 80).view(40, 2)
        self.label = (self.x[:, 0] > 0).long() + (self.x[:, 0] > 0.5).long()
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return 40

    def batch(self, which: np.ndarray, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        self.asked.append(which.tolist())
        return self.x[which], self.label[which]

    def checks(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.x[:30], self.label[:30]
        yield self.x[30:], self.label[30:]


class Watched(torch.nn.Module):
    """A model that notes the totals which it is called with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def begin(self) -> Any:
        return self.model.begin()

    def forward(self, x: Tensor, totals: Any = None, margin: float = 0.0) -> Any:
        self.seen.append(None if totals is None else [own.clone() for own in totals])
        return self.model(x, totals, margin)


def small(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {
        "width": 2,
        "num_experts": (3, 2),
        "expert_width": (5, 4),
        "gate_width": (3, 3),
        "num_classes": 3,
    }
    return PAPER.build(PAPER.Settings(**{**sizes, **changes}))


def quiet(share: float, state: str) -> None:
    assert 0 < share <= 1
    assert "loss" in state


def test_the_first_phase_is_restrained_and_the_second_is_not():
    model, cases = Watched(small()), Points()
    curve = learn(model, Recipe(2, 1, batch=15), 4.0, cases, 3, quiet)
    assert [own is None for own in model.seen] == [False] * 6 + [True] * 3
    # 15, 15 and 10 cases an epoch, counted on from batch to batch and over epochs.
    for layer in (0, 1):
        counted = [float(own[layer].sum()) for own in model.seen[:6]]
        assert counted == pytest.approx([0, 15, 30, 40, 55, 70])
    for epoch in range(3):
        order = [case for batch in cases.asked[3 * epoch : 3 * epoch + 3] for case in batch]
        assert sorted(order) == list(range(40))
    assert cases.asked[:3] != cases.asked[3:6]
    assert len(curve) == 3
    assert all(
        1 <= value <= size for own in curve for value, size in zip(own["effective"], (3, 2), strict=True)
    )


def test_a_run_is_the_plain_loop():
    model, cases, twin = small(), Points(), small()
    learn(model, Recipe(1, 1, rate=0.3, momentum=0.5, batch=20), 2.0, cases, 5, quiet)
    speed = [torch.zeros_like(p) for p in twin.parameters()]
    totals = twin.begin()
    for step, which in enumerate(cases.asked):
        output = twin(cases.x[which], totals if step < 2 else None, 2.0)
        totals = output.totals if step < 2 else totals
        loss = -torch.log_softmax(output.logits, -1)[range(20), cases.label[which]].mean()
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        for p, v, g in zip(twin.parameters(), speed, gradients, strict=True):
            v.mul_(0.5).add_(g)
            p.data -= 0.3 * v
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_learning_learns_and_errors_are_per_cent_of_all_cases():
    model, cases = small(), Points()
    before = error_of(model, cases, "train")
    learn(model, Recipe(2, 40, rate=0.1, batch=10), 5.0, cases, 0, quiet)
    right = model(cases.x).logits.argmax(-1) == cases.label
    assert error_of(model, cases, "test") == pytest.approx(100 * (1 - float(right.double().mean())))
    assert error_of(model, cases, "train") < min(before, 20)


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(Diverged, match="not finite in epoch 1 of seed 0 at rate 1e"):
        learn(small(), Recipe(0, 2, rate=1e30, batch=10), 5.0, Points(), 0, quiet)


def pictures(count: int) -> Pictures:
    draw = np.random.default_rng(0)
    return Pictures(draw.random((count, 2, 2), dtype=np.float32), draw.integers(0, 10, count))


def test_gates_are_summed_over_every_picture_at_every_place():
    cases = Shifted(pictures(4), pictures(7))
    model = small(width=100, num_classes=10)
    with torch.no_grad():
        for own in model.parameters():
            own.mul_(5)  # gates that are sure, so that pairs differ from products of means
    found = gates_by_place(model, cases)
    place, label, joint = torch.zeros(PLACES, 3), torch.zeros(10, 2), torch.zeros(3, 2)
    for number in range(7):
        for where in range(PLACES):
            x = cases.test.shifted(np.array([number]), np.array([where]))
            first, second = (own[0].detach() for own in model(torch.from_numpy(x)).gates)
            place[where] += first
            label[cases.test.label[number]] += second
            joint += torch.outer(first, second)
    torch.testing.assert_close(torch.tensor(found["place"][0]), place, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["label"][1]), label, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(found["joint"]), joint, rtol=1e-4, atol=1e-4)
    assert [len(found["place"][1]), len(found["label"][0])] == [PLACES, 10]


def test_gates_of_plain_cases_are_summed_by_class():
    class Whole(Points):
        def checks(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
            assert part == "test"
            yield self.x, self.label

    model, cases = small(), Whole()
    found, gates = gates_by_class(model, cases), [own.detach() for own in model(cases.x).gates]
    for c in range(3):
        told = gates[1][cases.label == c].sum(0)
        torch.testing.assert_close(torch.tensor(found["label"][1][c]), told, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["joint"]), gates[0].t() @ gates[1], rtol=1e-4, atol=1e-5)


def test_pictures_move_in_training_and_stay_in_checks():
    cases = Shifted(pictures(30), pictures(20))
    which, draw = np.arange(30), np.random.default_rng(1)
    one, two = (cases.batch(which, draw)[0] for _ in range(2))
    assert not torch.equal(one, two)
    for moved, own in zip(one, cases.train.pixels, strict=True):
        assert float(moved.sum()) == pytest.approx(float(own.sum()))
    for part, size in (("train", 30), ("test", 20)):
        (x, label), *_ = cases.checks(part)
        (again, _), *_ = cases.checks(part)
        assert torch.equal(x, again)
        assert (len(x), len(label)) == (size, size)
        assert len({tuple(row.nonzero()[0].tolist()) for row in x}) > 5
