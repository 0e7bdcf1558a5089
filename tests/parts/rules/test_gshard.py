"""GShard against its algorithm 1 as printed, through the layer: who sits where, and at what weight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import Capacity, MoELayer, RoutingCall, build_router, make_plan
from gatewright.parts.balancing import gshard_loss
from gatewright.parts.dispatch import queue_positions
from gatewright.parts.rules import threshold_second
from gatewright.parts.rules.gshard import GShard
from gatewright.parts.rules.threshold_second import later_choice_coins
from tests.oracle import gshard as oracle
from tests.parts.harness import oracle_weights, repeatable
from tests.parts.rules.against import call_of


def scores_of(*rows: list[float]) -> Tensor:
    """Return fp64 scores [T, E]."""
    return torch.tensor(rows, dtype=torch.float64)


def fix_coins(monkeypatch: pytest.MonkeyPatch, *numbers: float) -> None:
    """Fix the coin number of each token."""
    coins = torch.tensor(numbers).unsqueeze(-1)
    monkeypatch.setattr(threshold_second, "later_choice_coins", lambda *_: coins)


def test_the_second_is_used_where_twice_its_share_beats_the_coin(monkeypatch):
    # (.5, .3, .2): g = .5/.8, .3/.8 = .625, .375, and 2 g2 = .75. (.6, .3, .1): g2 = 1/3, 2 g2 = .667.
    scores = scores_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1])
    fix_coins(monkeypatch, 0.74, 0.76, 0.67)
    chosen = GShard()(scores.log(), scores, call_of())
    assert chosen.experts.tolist() == [[0, 1], [0, -1], [0, -1]]
    # What a token loses is not made up for: .625 stays .625.
    assert chosen.weights.flatten().tolist() == pytest.approx([0.625, 0.375, 0.625, 0, 2 / 3, 0])


def test_twice_the_share_is_the_probability():
    # 2 g2 = .75 of 20000 tokens; four standard deviations are .0122.
    scores = scores_of([0.5, 0.3, 0.2]).expand(20_000, 3)
    used = GShard()(scores.log(), scores, call_of(key=3)).experts[:, 1] >= 0
    assert abs(used.double().mean().item() - 0.75) < 0.0122


def seats(scores: Tensor, counters: str) -> list[list[bool]]:
    """Return which choices [S, 2] of one group find room in C = ceil(2 S / E)."""
    chosen = GShard(counters=counters)(scores.log(), scores, call_of())
    limit = Capacity(1.0, order="rank").places(2, scores.shape[0], scores.shape[1], True)
    return (make_plan(chosen, limit, order="rank").slots >= 0).tolist()


def test_a_rejected_choice_wastes_a_place_as_printed_and_none_in_the_authors_code(monkeypatch):
    # Three tokens, three experts: C = 2. Tokens 0 and 1 want (0, 1), token 2 wants (1, 0).
    # First choices: 0 <- t0, t1 (full); 1 <- t2. Second choices: t0 is rejected by its coin, t1 wants the
    # last place of 1: free in the authors' code, wasted by t0 as printed. t2 wants 0, which is full.
    scores = scores_of([0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.4, 0.5, 0.1])
    fix_coins(monkeypatch, 0.99, 0.1, 0.1)
    assert seats(scores, "compact") == [[True, False], [True, True], [True, False]]
    assert seats(scores, "literal") == [[True, False], [True, False], [True, False]]


def test_first_choices_go_before_second_ones_of_earlier_tokens(monkeypatch):
    # Two tokens, four experts: C = 1. Token 0 wants (0, 1), token 1 wants (1, 2): expert 1 is token 1's.
    scores = scores_of([0.5, 0.4, 0.1, 0.0], [0.1, 0.5, 0.4, 0.0])
    fix_coins(monkeypatch, 0.0, 0.0)
    assert seats(scores, "compact") == [[True, False], [True, True]]


def test_a_token_without_room_passes_by():
    # Four equal tokens, four experts, C = 2: tokens 2 and 3 get nothing at all.
    layer = MoELayer(4, 4, 2, 3, router=build_router("gshard", 4, 4, 2, coin="never")).double()
    x = torch.ones(4, 4, dtype=torch.float64)
    y, stats = layer(x)
    assert y[:2].any(dim=1).all()
    assert not y[2:].any()
    assert int(stats["router"].unrouted) == 2
    assert stats["router"].dropped_by_rank.tolist() == [2, 2]


def test_capacity_is_twice_the_tokens_over_the_experts():
    router = build_router("gshard", 8, 4, 2)
    assert router.capacity == Capacity(1.0, order="rank")
    # 2 S / E: 2 * 6 / 4 = 3; 2 * 7 / 4 = 3.5, rounded up.
    assert [router.capacity.places(2, s, 4, True) for s in (6, 7)] == [3, 4]


def test_when_the_coin_is_flipped(monkeypatch):
    scores = scores_of([0.9, 0.1])
    fix_coins(monkeypatch, 0.99)
    for coin, training, flips in (
        ("train", True, True),
        ("train", False, False),
        ("always", False, True),
        ("never", True, False),
    ):
        chosen = GShard(coin)(scores.log(), scores, call_of(training=training))
        assert chosen.experts.tolist() == ([[0, -1]] if flips else [[0, 1]]), (coin, training)


@dataclass(frozen=True)
class Case:
    """A GShard layer on one batch; a factor of 0.01 gives every expert one place."""

    num_tokens: int
    width: int
    num_experts: int
    factor: float
    group_size: int | None
    masked: bool
    counters: str
    training: bool
    ties: bool
    seed: int


CASES = st.builds(
    Case,
    st.integers(0, 7),
    st.integers(1, 2),
    st.integers(2, 4),
    st.sampled_from((0.01, 0.3, 0.5, 0.75, 1.0, 1.25, 3.0)),
    st.none() | st.integers(1, 4),
    st.booleans(),
    st.sampled_from(("compact", "literal")),
    st.sampled_from((True, True, True, False)),
    st.sampled_from((False, False, False, True)),
    st.integers(0, 10_000),
)


def layer_of(case: Case) -> tuple[MoELayer, Tensor, Tensor]:
    """Return the layer, x and a mask."""
    router = build_router("gshard", case.width, case.num_experts, 2, counters=case.counters)
    own = Capacity(case.factor, order="rank")
    layer = MoELayer(
        *(case.width, case.num_experts, 2, 2), router=router, capacity=own, group_size=case.group_size
    )
    draw = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        if case.ties:
            layer.router.weight.zero_()
    x = torch.randn(case.num_tokens, case.width, generator=draw, dtype=torch.float64)
    mask = torch.rand(case.num_tokens, generator=draw) < 0.7
    if not case.masked:
        mask = torch.ones_like(mask)
    return layer.double().train(case.training), x, mask


@repeatable(200)
@given(case=CASES)
def test_equals_algorithm_1_line_by_line(case: Case):
    layer, x, mask = layer_of(case)
    x.requires_grad_()
    call = RoutingCall(mask, case.training, torch.tensor(case.seed), None, case.group_size)
    y, stats = layer(x, mask, capture=True, key=call.key)
    record = stats["router"]

    leaf = x.detach().clone().requires_grad_()
    weights = oracle_weights(layer)
    coins = later_choice_coins(call, case.num_tokens, 1, x.device).flatten().tolist()
    coins = coins if case.training else None
    literal = case.counters == "literal"
    expected, got, first_counts, loss = oracle.gshard_layer(
        leaf, weights, case.factor, case.group_size, mask.tolist(), coins, literal
    )
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    # Places: each kept choice stands where the sequential algorithm put it.
    routed = layer.router.route(x.detach(), call)
    queue = queue_positions(routed.assignment, case.group_size, "rank")
    wanted = torch.zeros(case.num_experts, dtype=torch.int64)
    for t, token in enumerate(got):
        held = {
            int(e): (int(queue[t, k]), record.combine_weights[t, k].item())
            for k, e in enumerate(record.experts[t].tolist())
            if e >= 0
        }
        places = {} if token is None else token.places
        assert {e: place for e, (place, _) in held.items()} == places
        for e, (_, weight) in held.items():
            assert weight == pytest.approx(token.weights[e].item(), rel=1e-12)
        for e in [] if token is None else token.wanted:
            wanted[e] += 1
    assert record.counts.tolist() == wanted.tolist()
    totals = [sum(column) for column in zip(*first_counts, strict=True)] or [0] * case.num_experts
    assert record.first_counts.tolist() == totals
    if case.group_size is None:
        # As printed the loss lacks the factor E^2.
        printed = gshard_loss(stats) / case.num_experts**2
        torch.testing.assert_close(printed, loss, rtol=1e-12, atol=1e-12)

    direction = torch.linspace(0.5, 2.0, y.numel(), dtype=torch.float64).view_as(y)
    pairs = [(x, leaf), (layer.router.weight, weights.router), (layer.experts.w_in, weights.w_in)]
    nothing = sum(0 * theirs.sum() for _, theirs in pairs)
    ours = torch.autograd.grad((y * direction).sum(), [mine for mine, _ in pairs])
    theirs = torch.autograd.grad((expected * direction).sum() + nothing, [other for _, other in pairs])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_group_is_a_world_of_its_own():
    # Two groups of three swapped: the outputs swap. One group of six drops others.
    case = Case(6, 3, 4, 0.5, 3, False, "compact", False, False, 1)
    layer, x, _ = layer_of(case)
    y, _ = layer(x)
    swapped, _ = layer(torch.cat([x[3:], x[:3]]))
    assert torch.equal(torch.cat([swapped[3:], swapped[:3]]), y)
    whole, _, _ = layer_of(dataclasses.replace(case, group_size=None))
    assert not torch.equal(whole(x)[0], y)


def test_other_numbers_of_experts_per_token_are_refused():
    with pytest.raises(UserError, match="'gshard' with num_selected 3; allowed: 2"):
        build_router("gshard", 8, 4, 3)
    with pytest.raises(UserError, match="num_selected 2 with num_experts 1"):
        build_router("gshard", 8, 1, 2)
    with pytest.raises(UserError, match="counters 'litteral' is unknown; did you mean 'literal'"):
        build_router("gshard", 8, 4, 2, counters="litteral")
