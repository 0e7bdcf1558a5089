"""EM of a tree: an epoch by hand, posteriors in loops, and a likelihood that never falls."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.backbones import ExpertTree
from gatewright.errors import UserError
from gatewright.training.em import COVARIANCES, EM, e_step, fit_em, m_step
from gatewright.training.seeded import drawn
from gatewright.training.weighted_fits import fit_logits, least_squares

F = torch.float64


def pair() -> tuple[ExpertTree, Tensor, Tensor]:
    """Two experts that say 0 and 2 everywhere, equal gates; cases (-1, 0), (-1, 2), (1, 0), (1, 1)."""
    tree = drawn(lambda: ExpertTree(1, (2,), 1), 0)
    with torch.no_grad():
        for own in (tree.experts, tree.levels[0]):
            own.weight.zero_()
            own.bias.zero_()
        tree.experts.bias[1] = 2.0
    return (
        tree,
        torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=F),
        torch.tensor([[0.0], [2.0], [0.0], [1.0]], dtype=F),
    )


# ln P_2 / P_1 = (y^2 - (y - 2)^2) / 2 = 2 y - 2, so h_1 = 1 / (1 + e^(2 y - 2)): A, 1 - A, A and 1/2.
A = 1 / (1 + math.exp(-2))


def test_an_e_step_by_hand():
    found = e_step(*pair())
    assert found.experts[:, 0].tolist() == pytest.approx([A, 1 - A, A, 0.5], rel=1e-12)
    assert found.branches[0][:, 0, 0].tolist() == pytest.approx([math.log(h) for h in (A, 1 - A, A, 0.5)])
    assert found.nodes[0].flatten().tolist() == pytest.approx([1.0] * 4)
    # (N(0; 0, 1) + N(0; 2, 1)) / 2 for y = 0, the same for y = 2, and N(1; 0, 1) for y = 1.
    normal = 1 / math.sqrt(2 * math.pi)
    ends, middle = math.log(normal * (1 + math.exp(-2)) / 2), math.log(normal * math.exp(-0.5))
    assert found.log_likelihood.tolist() == pytest.approx([ends, ends, ends, middle], rel=1e-12)


def test_an_exact_m_step_by_hand():
    tree, x, y = pair()
    m_step(tree, x, y, e_step(tree, x, y), EM(covariance="spherical"))
    # A line through two places goes through their weighed means: expert 1 at -1, (A 0 + (1 - A) 2) / 1, and
    # at 1,
    # (A 0 + 1/2) / (A + 1/2); expert 2 has the weights 1 - h_1.
    one = [2 - 2 * A, 0.5 / (A + 0.5)]
    two = [2 * A, 0.5 / (1.5 - A)]
    for expert, (left, right) in enumerate((one, two)):
        assert tree.experts.weight[expert].item() == pytest.approx((right - left) / 2, rel=1e-8)
        assert tree.experts.bias[expert].item() == pytest.approx((right + left) / 2, rel=1e-8)
    # Its weighed squares over its weights: A left^2 + (1 - A) (2 - left)^2 + A right^2 + (1 - right)^2 / 2.
    left, right = one
    squares = A * left**2 + (1 - A) * (2 - left) ** 2 + A * right**2 + 0.5 * (1 - right) ** 2
    assert tree.covariance[0].item() == pytest.approx(squares / (A + (1 - A) + A + 0.5), rel=1e-8)
    # The gate's two weights can give the mean posterior at either place: 1/2 at -1 and (A + 1/2) / 2 at 1.
    logit = math.log((A + 0.5) / (1.5 - A))
    gate = tree.levels[0]
    assert (gate.weight[0, 0] - gate.weight[0, 1]).item() == pytest.approx(logit / 2, rel=1e-5)
    assert (gate.bias[0, 0] - gate.bias[0, 1]).item() == pytest.approx(logit / 2, rel=1e-5)


def test_a_least_squares_m_step_by_hand():
    tree, x, y = pair()
    m_step(tree, x, y, e_step(tree, x, y), EM("least_squares", "unit"))
    # Each branch's line goes through the mean of ln h at either place.
    for branch, h in enumerate(([A, 1 - A, A, 0.5], [1 - A, A, 1 - A, 0.5])):
        left, right = (math.log(h[0]) + math.log(h[1])) / 2, (math.log(h[2]) + math.log(h[3])) / 2
        assert tree.levels[0].weight[0, branch].item() == pytest.approx((right - left) / 2, rel=1e-8)
        assert tree.levels[0].bias[0, branch].item() == pytest.approx((right + left) / 2, rel=1e-8)
    assert tree.covariance[0].item() == 1.0
    m_step(tree, x, y, e_step(*pair()), EM("least_squares", "unit", least_log=math.log(0.4)))
    # 1 - A = 0.12 is cut to 0.4.
    assert tree.levels[0].bias[0, 1].item() == pytest.approx(
        (math.log(0.4) + math.log(A) + math.log(0.4) + math.log(0.5)) / 4, rel=1e-8
    )


def problem(seed: int, squash: str, cases: int = 24) -> tuple[ExpertTree, Tensor, Tensor, Tensor]:
    """Return a tree, cases that suit it, and their weights, some of them awkward: constant columns, few
    cases.
    """
    draw = torch.Generator().manual_seed(seed)
    width, outputs = 1 + seed % 3, 1 + seed // 3 % 3
    branching = [(2,), (2, 2), (3, 2), (2, 2, 2), (4,)][seed % 5]
    tree = drawn(lambda: ExpertTree(width, branching, outputs, squash, init=1.0, gate_init=1.0), seed)
    x = torch.randn(5 if seed % 11 == 0 else cases, width, generator=draw, dtype=F)
    if seed % 7 == 0:
        x[:, 0] = 1.0
    scale = 10.0 ** (seed % 4 - 1)
    if squash == "linear":
        y = scale * (x[:, :1].abs() + 0.1 * torch.randn(len(x), outputs, generator=draw, dtype=F))
    elif squash == "logistic":
        y = (torch.rand(len(x), outputs, generator=draw, dtype=F) > 0.5).double()
    else:
        classes = torch.randint(0, outputs, (len(x),), generator=draw)
        # Every third problem can be told apart without an error: weights would grow for ever.
        classes = (x[:, 0] > 0).long() % outputs if seed % 3 == 2 else classes
        y = torch.nn.functional.one_hot(classes, outputs).double()
    weights = torch.randint(0, 4, (len(x),), generator=draw).double()
    weights[0] = 1.0
    return tree, x, y, weights


@pytest.mark.parametrize(("squash", "count"), [("linear", 120), ("softmax", 50), ("logistic", 30)])
def test_the_likelihood_never_falls_under_exact_m_steps(squash: str, count: int):
    for seed in range(count):
        tree, x, y, weights = problem(seed, squash)
        em = EM(covariance=COVARIANCES[seed % 5], floor=1e-4)
        history = fit_em(tree, x, y, epochs=4, em=em, case_weights=weights if seed % 2 else None)
        assert all(math.isfinite(value) for value in history), seed
        for before, after in itertools.pairwise(history):
            assert after >= before - 1e-9 * (1 + abs(before)), (seed, history)


def test_posteriors_of_a_tree_in_loops():
    tree, x, y, _ = problem(8, "linear")
    found = e_step(tree, x, y)
    tree.requires_grad_(False)
    output = tree(x)
    top, low, third = (own.exp() for own in tree.log_gates(x))
    for t in range(3):
        made = []
        for i in range(2):
            for j in range(2):
                for k in range(2):
                    r = y[t] - output.outputs[t, 4 * i + 2 * j + k]
                    density = math.exp(-float(r @ r) / 2) / (2 * math.pi) ** (len(r) / 2)
                    made.append(float(top[t, 0, i] * low[t, i, j] * third[t, 2 * i + j, k]) * density)
        assert found.log_likelihood[t].item() == pytest.approx(math.log(sum(made)))
        for e, own in enumerate(made):
            assert found.experts[t, e].item() == pytest.approx(own / sum(made))
        # The node that is second of the second level has experts 2 and 3 below it.
        assert found.nodes[2][t, 1].item() == pytest.approx((made[2] + made[3]) / sum(made))
        assert found.branches[2][t, 1, 0].exp().item() == pytest.approx(made[2] / (made[2] + made[3]))
        assert found.nodes[1][t, 1].item() == pytest.approx(sum(made[4:]) / sum(made))
        assert found.branches[1][t, 1, 1].exp().item() == pytest.approx(sum(made[6:]) / sum(made[4:]))


def test_two_lines_are_found():
    x = torch.linspace(-1, 1, 80, dtype=F).unsqueeze(-1)
    y = torch.where(x < 0, -3 * x, 2 * x)
    for form in ("exact", "least_squares"):
        tree = drawn(lambda: ExpertTree(1, (2,), 1), 1)
        history = fit_em(tree, x, y, epochs=60, em=EM(form, "spherical"))
        slopes = sorted(tree.experts.weight.flatten().tolist())
        assert slopes == pytest.approx([-3, 2], abs=0.05), form
        assert history[-1] > history[0] + 50
    assert float((tree(x).blend.detach() - y).square().mean()) < 0.01


def test_weights_of_cases_are_repetitions():
    tree, x, y, weights = problem(1, "linear")
    repeated = weights.long()
    again = drawn(lambda: ExpertTree(2, tree.branching, 1, init=1.0, gate_init=1.0), 1)
    one = fit_em(tree, x, y, epochs=4, case_weights=weights)
    two = fit_em(again, x.repeat_interleave(repeated, 0), y.repeat_interleave(repeated, 0), epochs=4)
    assert one == pytest.approx(two, rel=1e-9)
    torch.testing.assert_close(tree(x).blend, again(x).blend, rtol=1e-7, atol=1e-9)


def test_a_fit_ends_once_an_epoch_gains_little():
    tree, x, y, _ = problem(1, "linear")
    seen: list[int] = []
    history = fit_em(tree, x, y, epochs=500, tolerance=1e-3, watch=lambda epoch, *_: seen.append(epoch))
    assert len(seen) == len(history) - 1 < 500
    assert abs(history[-1] - history[-2]) < 1e-3 * len(x)


def test_least_squares_is_the_weighed_minimum_and_keeps_what_nothing_speaks_of():
    draw = torch.Generator().manual_seed(0)
    x, y, w = (torch.rand(9, k, generator=draw, dtype=F) for k in (2, 2, 1))
    found = least_squares(x, y, w[:, 0], torch.zeros(2, 2, dtype=F))
    root = w.sqrt()
    torch.testing.assert_close(
        found, torch.linalg.lstsq(root * x, root * y).solution.t(), rtol=1e-7, atol=1e-9
    )
    start = torch.full((2, 2), 3.0, dtype=F)
    assert torch.equal(least_squares(x, y, torch.zeros(9, dtype=F), start), start)


def test_a_multinomial_logit_has_no_slope_left():
    draw = torch.Generator().manual_seed(0)
    x, masses = torch.randn(40, 3, generator=draw, dtype=F), torch.rand(40, 4, generator=draw, dtype=F)
    found = fit_logits(x, masses, torch.randn(4, 3, generator=draw, dtype=F))
    g = torch.softmax(x @ found.t(), -1)
    slope = (masses - masses.sum(-1, keepdim=True) * g).t() @ x
    assert float(slope.abs().max()) < 1e-3
    assert not found[-1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "exat"}, "form 'exat' is unknown; did you mean 'exact'"),
        ({"covariance": "diag"}, "covariance 'diag' is unknown; .*allowed: full, diagonal"),
        ({"floor": 0.0}, "floor 0.0; allowed: above 0"),
    ],
)
def test_ways_of_fitting_that_are_not_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        EM(**changes)
