"""ReMoE's ReLU routing: numbers worked by hand, lambda's steps, the slow rule, the sparsity it reaches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, build_router, count_assignments
from gatewright.parts.rules.relu import LARGEST_PENALTY, LEAST_PENALTY, ReLURouting
from tests.oracle import relu as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens

LOGITS = [[2.0, -1.0, 1.0], [0.0, -3.0, 0.5], [-1.0, -2.0, -0.5]]


def routed(rule: ReLURouting, logits: Tensor, call: RoutingCall | None = None):
    """Return the assignment of relu(logits)."""
    return rule(logits, torch.relu(logits), call or RoutingCall())


def test_every_expert_above_zero_is_used_at_its_own_weight():
    chosen = routed(ReLURouting(3, 1), torch.tensor(LOGITS))
    assert chosen.experts.tolist() == [[0, 2], [2, -1], [-1, -1]]
    assert chosen.weights.tolist() == [[2.0, 1.0], [0.5, 0.0], [0.0, 0.0]]


def test_the_penalty_by_hand():
    # T = 3, E = 3, k = 1: loads 1, 0, 2, so f_e = E / (k T) loads = 1, 0, 2; sums of R: 2, 0, 1.5.
    # lambda (1 * 2 + 2 * 1.5) = lambda * 5.
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    total = routed(ReLURouting(3, 1, start=0.5), logits).sums["relu_penalty"]
    assert total.item() == pytest.approx(0.5 * 5)
    total.backward()
    # Each R > 0 is pushed down by lambda f_e; f itself carries no gradient.
    assert logits.grad.tolist() == [[0.5, 0, 1.0], [0, 0, 1.0], [0, 0, 0]]
    # k = 2 halves f.
    assert routed(ReLURouting(3, 2, start=0.5), logits).sums["relu_penalty"].item() == pytest.approx(1.25)


def test_padding_enters_neither_choice_nor_penalty():
    mask = torch.tensor([True, True, False])
    logits = torch.tensor([LOGITS[0], LOGITS[1], [9.0, 9.0, 9.0]])
    chosen = routed(ReLURouting(3, 1, start=1.0), logits, RoutingCall(mask=mask))
    assert chosen.experts.tolist() == [[0, 2], [2, -1], [-1, -1]]
    # T = 2: f = 3 / 2 * (1, 0, 2) = 1.5, 0, 3; 1.5 * 2 + 3 * 1.5 = 7.5.
    assert chosen.sums["relu_penalty"].item() == pytest.approx(7.5)
    nobody = routed(ReLURouting(3, 1), logits, RoutingCall(mask=torch.zeros(3, dtype=torch.bool)))
    assert nobody.sums["relu_penalty"].item() == 0


def test_lambda_goes_up_while_too_many_are_used_and_down_while_too_few():
    # E = 4, k = 1, T = 8: the target is 8 assignments, a share of zeros of 3/4.
    rule = ReLURouting(4, 1)
    assert rule.penalty.item() == pytest.approx(1e-8)
    rule.update(torch.tensor([8, 8, 8, 8]), 8)
    rule.update(torch.tensor([8, 1, 0, 0]), torch.tensor(8))
    assert rule.penalty.item() == pytest.approx(1.2**2 * 1e-8)
    rule.update(torch.tensor([8, 0, 0, 0]), 8)
    assert rule.penalty.item() == pytest.approx(1.2**2 * 1e-8)
    rule.update(torch.tensor([7, 0, 0, 0]), 8)
    assert rule.penalty.item() == pytest.approx(1.2 * 1e-8)
    rule.update(torch.zeros(4, dtype=torch.int64), 0)
    assert rule.penalty.item() == pytest.approx(1.2 * 1e-8)


def test_lambda_can_come_back_from_either_end():
    up, down = ReLURouting(2, 1, alpha=1e10), ReLURouting(2, 1, alpha=1e10)
    for _ in range(9):
        up.update(torch.tensor([5, 5]), 5)
        down.update(torch.tensor([0, 0]), 5)
    assert up.penalty.item() == pytest.approx(LARGEST_PENALTY)
    assert down.penalty.item() == pytest.approx(LEAST_PENALTY)
    up.update(torch.tensor([0, 0]), 5)
    assert up.penalty.item() == pytest.approx(LARGEST_PENALTY / 1e10)


def test_lambda_is_saved_stays_fp32_and_is_no_parameter():
    router = build_router("remoe", 4, 4, 1, start=0.3).bfloat16()
    router.rule.update(torch.tensor([8, 8, 8, 8]), 8)
    assert router.rule.penalty.dtype == torch.float32
    assert set(router.state_dict()) == {"weight", "rule.penalty"}
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    other = build_router("remoe", 4, 4, 1)
    assert other.bias is None
    assert build_router("remoe", 4, 4, 1, bias=True).bias is not None
    other.load_state_dict(router.state_dict())
    assert other.rule.penalty.item() == pytest.approx(0.36)


@repeatable(200)
@given(given_tokens=routed_tokens(), data=st.data())
def test_it_is_the_slow_rule(given_tokens: tuple[Tensor, Tensor | None], data: st.DataObject):
    logits, mask = given_tokens
    num_tokens, num_experts = logits.shape
    num_selected = data.draw(st.integers(1, num_experts))
    rule = ReLURouting(num_experts, num_selected, start=0.25)
    ours, theirs = leaves(logits)
    found = routed(rule, ours, call_of(mask))
    real = [True] * num_tokens if mask is None else mask.tolist()
    chosen = oracle.route([list(row) for row in theirs], real)
    expected = [([e for e, _ in pairs], [value for _, value in pairs]) for pairs in chosen]
    slow = oracle.penalty(chosen, num_experts, num_selected, max(sum(real), 1), 0.25)
    slow = slow if isinstance(slow, Tensor) else theirs.sum() * 0 + slow
    assert_same(found, expected, [(ours, theirs)], [(found.sums["relu_penalty"], slow)])
    loads = oracle.counts(chosen, num_experts)
    assert count_assignments(found).tolist() == loads
    rule.update(torch.tensor(loads), sum(real))
    wanted = oracle.learn(0.25, loads, num_selected, sum(real), 1.2)
    assert rule.penalty.item() == pytest.approx(wanted, rel=1e-6)


def test_a_trained_layer_reaches_its_sparsity_and_stays_there():
    # E = 8, k = 2: three quarters are zeros, after about 100 steps as in the paper (1.2^100 * 1e-8 is .8).
    # Tokens share a direction: without one, half of any linear map's outputs are positive.
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 2, 4, router="remoe")
    x = torch.randn(128, 8)
    x[:, 0] = 2.0
    target = torch.where(x[:, 1:2] > 0, x.flip(1), -x) + torch.sin(3 * x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
    zeros, losses = [], []
    for _ in range(220):
        y, stats = layer(x)
        record = stats["router"]
        task = (y - target).square().mean()
        optimizer.zero_grad()
        (task + record.sums["relu_penalty"] / record.tokens).backward()
        optimizer.step()
        layer.router.rule.update(record.counts, record.tokens)
        zeros.append(1 - record.counts.sum().item() / (128 * 8))
        losses.append(task.item())
    assert zeros[0] < 0.7
    assert 80 <= next(step for step, share in enumerate(zeros) if share >= 0.75) <= 130
    late = torch.tensor(zeros[140:])
    assert abs(late.mean().item() - 0.75) < 0.03
    assert (late - 0.75).abs().max() < 0.1
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_any_dtype_and_no_tokens(dtype: torch.dtype, num_tokens: int):
    chosen = routed(ReLURouting(4, 2), torch.randn(num_tokens, 4).to(dtype))
    assert chosen.weights.dtype == dtype
    assert torch.isfinite(chosen.sums["relu_penalty"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_selected": 5}, "num_selected 5 with num_experts 4"),
        ({"alpha": 1.0}, "alpha 1.0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"start": 0.0}, "start 0.0"),
    ],
)
def test_bad_input_is_refused(options: dict[str, float], said: str):
    with pytest.raises(UserError, match=said):
        ReLURouting(**{"num_experts": 4, "num_selected": 2, **options})


def test_loads_of_other_experts_are_refused():
    with pytest.raises(UserError, match=r"counts of \(3,\) with num_experts 4"):
        ReLURouting(4, 2).update(torch.zeros(3, dtype=torch.int64), 0)
