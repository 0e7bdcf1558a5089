"""Hash routing: tables worked by hand, balance, weights, the slow rule, checkpoints, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.backbones import Decoder
from gatewright.backbones.cost import count_cost, on_no_memory
from gatewright.backbones.initialise import fan_in, normal
from gatewright.errors import UserError
from gatewright.parts import MoELayer, Router, RoutingCall, build_router
from gatewright.parts.rules.hash import HashRouter, HashRule, hash_table
from gatewright.training.precision import set_router_dtype
from tests.oracle import group_limited, moe
from tests.oracle import hash as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, leaves


def call_with(ids: list[int], mask: list[bool] | None = None, training: bool = True) -> RoutingCall:
    """Return a call with token ids."""
    return RoutingCall(
        mask=None if mask is None else torch.tensor(mask, dtype=torch.bool),
        training=training,
        token_ids=torch.tensor(ids, dtype=torch.int64),
    )


def load_of(table: torch.Tensor, frequencies: list[int], num_experts: int) -> list[int]:
    """Return how often each expert is used in a corpus with these frequencies."""
    load = [0] * num_experts
    for row, frequency in zip(table.tolist(), frequencies, strict=True):
        for e in row:
            load[e] += frequency
    return load


def test_a_balanced_table_evens_out_what_ids_would_not():
    # a 40 -> 0; b 30 -> 1; c 20 -> 1 (30 < 40), now 50; d 10 -> 0 (40 < 50), now 50: 50/50, id mod 2: 60/40.
    frequencies = [40, 30, 20, 10]
    table = hash_table(4, 2, 1, frequencies)
    assert table.tolist() == [[0], [1], [1], [0]]
    assert load_of(table, frequencies, 2) == [50, 50]
    assert load_of(torch.tensor([[0], [1], [0], [1]]), frequencies, 2) == [60, 40]


def test_two_experts_each_by_hand():
    # a 5 -> 0, 1 (5, 5, 0); b 4 -> 2 (0), then 0 (5, the lower id): 9, 5, 4; c 3 -> 2, 1: 9, 8, 7.
    assert hash_table(3, 3, 2, [5, 4, 3]).tolist() == [[0, 1], [2, 0], [2, 1]]


def test_ids_that_never_occur_are_spread_too():
    # All loads stay 0: fewest ids first, then the lowest expert.
    assert hash_table(5, 2, 1, [0, 0, 0, 0, 0]).flatten().tolist() == [0, 1, 0, 1, 0]


@repeatable(200)
@given(
    frequencies=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    num_experts=st.integers(1, 5),
    data=st.data(),
)
def test_a_balanced_table_is_the_slow_one(frequencies: list[int], num_experts: int, data: st.DataObject):
    num_selected = data.draw(st.integers(1, num_experts))
    table = hash_table(len(frequencies), num_experts, num_selected, frequencies)
    assert table.tolist() == oracle.balanced(frequencies, num_experts, num_selected)
    load = load_of(table, frequencies, num_experts)
    # Each id goes to the lightest: no expert is ahead by more than the most frequent id.
    assert max(load) - min(load) <= max(frequencies)


@pytest.mark.parametrize(("vocab_size", "num_experts", "num_selected"), [(64, 8, 2), (257, 7, 3), (10, 4, 4)])
def test_a_random_table_is_even_distinct_and_of_many_combinations(vocab_size, num_experts, num_selected):
    table = hash_table(vocab_size, num_experts, num_selected, seed=3)
    held = torch.bincount(table.flatten(), minlength=num_experts)
    assert held.max() - held.min() <= 1
    assert all(len(set(row)) == num_selected for row in table.tolist())
    sets = {tuple(sorted(row)) for row in table.tolist()}
    possible = math.comb(num_experts, num_selected)
    assert len(sets) >= 0.5 * min(possible, vocab_size)
    assert torch.equal(table, hash_table(vocab_size, num_experts, num_selected, seed=3))
    if possible > 1:
        assert not torch.equal(table, hash_table(vocab_size, num_experts, num_selected, seed=4))


def test_the_id_alone_decides_and_uniform_weights_share():
    router = build_router("hash", 3, 4, 2, table=torch.tensor([[0, 3], [2, 1]]))
    chosen = router.route(torch.randn(3, 3), call_with([1, 0, 1])).assignment
    assert chosen.experts.tolist() == [[2, 1], [0, 3], [2, 1]]
    assert chosen.weights.tolist() == [[0.5, 0.5]] * 3
    one = build_router("hash", 3, 4, 1, vocab_size=5).route(torch.randn(2, 3), call_with([4, 4])).assignment
    assert one.weights.tolist() == [[1.0], [1.0]]


def test_padding_may_hold_any_id():
    router = build_router("hash", 3, 4, 2, vocab_size=5)
    chosen = router.route(torch.randn(3, 3), call_with([-1, 4, 99], [False, True, False])).assignment
    assert chosen.experts[[0, 2]].tolist() == [[-1, -1]] * 2
    assert chosen.experts[1].tolist() == router.rule.table[4].tolist()


def test_v4_weighs_by_a_learned_gate_what_the_table_chose():
    # Logits 0 and 1 (expert 1's 9 is not looked at): sqrt(ln 2) = .8326, sqrt(1.3133) = 1.1460; times 1.5.
    table = torch.tensor([[0, 2]])
    router = build_router("hash", 3, 3, 2, table=table, weights="learned", scale=1.5).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    x = torch.tensor([[0.0, 9.0, 1.0]], dtype=torch.float64)
    chosen = router.route(x, call_with([0])).assignment
    assert chosen.experts.tolist() == [[0, 2]]
    assert chosen.weights[0].tolist() == pytest.approx([0.6312, 0.8688], abs=5e-5)


@repeatable(200)
@given(
    num_tokens=st.integers(0, 5),
    num_experts=st.integers(2, 6),
    form=st.sampled_from(("uniform", "learned")),
    masked=st.booleans(),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_it_is_the_slow_rule(num_tokens, num_experts, form, masked, seed, data):
    num_selected = data.draw(st.integers(1 if form == "uniform" else 2, num_experts))
    scale = 1.0 if form == "uniform" else 1.5
    table = hash_table(7, num_experts, num_selected, seed=seed)
    source = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=source, dtype=torch.float64)
    ids = torch.randint(7, (num_tokens,), generator=source)
    mask = (torch.rand(num_tokens, generator=source) < 0.7).tolist() if masked else [True] * num_tokens
    ours, theirs = leaves(logits)
    scores = torch.sqrt(torch.nn.functional.softplus(ours))
    # Padding may hold any id.
    given_ids = [int(i) if real else -5 for i, real in zip(ids, mask, strict=True)]
    found = HashRule(table, num_experts, form, scale)(ours, scores, call_with(given_ids, mask))
    expected = []
    for t in range(num_tokens):
        row = table[ids[t]].tolist()
        slow = group_limited.scores_of("sqrt_softplus", list(theirs[t]))
        expected.append((row, oracle.weights(slow, row, form, scale)) if mask[t] else ([], []))
    assert_same(found, expected, [(ours, theirs)])


def test_without_a_gate_a_layer_trains_its_experts_alone():
    layer = MoELayer(3, 2, 1, 4, router=build_router("hash", 3, 2, 1, vocab_size=4, seed=1))
    x = torch.randn(5, 3, requires_grad=True)
    y, stats = layer(x, token_ids=torch.tensor([0, 1, 2, 3, 3]))
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    assert list(layer.router.parameters()) == []
    record = stats["router"]
    # Logits of 0: scores 1 / 2 each, logsumexp ln 2; they carry no gradient.
    assert record.score_sums.tolist() == [2.5, 2.5]
    assert record.logsumexp_sum.item() == pytest.approx(5 * math.log(2))
    assert not record.score_sums.requires_grad
    for t, e in enumerate(layer.router.rule.table[torch.tensor([0, 1, 2, 3, 3])].flatten().tolist()):
        w_in, w_down = layer.experts.w_in[e], layer.experts.w_down[e]
        expected = moe.feed_forward(x[t].detach(), w_in.detach(), w_down.detach(), "swiglu")
        torch.testing.assert_close(y[t].detach(), expected)


def hashed_decoder() -> Decoder:
    """Return a decoder of one hashed layer."""
    layer = MoELayer(8, 4, 2, 4, router=build_router("hash", 8, 4, 2, vocab_size=11))
    return Decoder(11, 8, 2, [layer], context=6)


def test_a_backbone_can_be_initialised_counted_and_cast_with_it():
    model = hashed_decoder()
    router = model.layers[0].feed_forward.router
    assert isinstance(router, HashRouter)
    assert isinstance(router, Router)
    for initialise in (normal, fan_in):
        initialise(model)
    set_router_dtype(model, "bf16")
    assert router(torch.zeros(2, 8)).dtype == torch.bfloat16
    cost = count_cost(model, 6)
    assert cost.flops["router"] == 0
    with on_no_memory():
        assert count_cost(hashed_decoder(), 6).total_parameters == cost.total_parameters
    model.bfloat16()
    assert router.rule.table.dtype == torch.int64


def test_the_table_is_saved_with_the_model():
    saved, loaded = (build_router("hash", 3, 4, 2, vocab_size=9, seed=seed) for seed in (1, 2))
    assert not torch.equal(saved.rule.table, loaded.rule.table)
    assert set(saved.state_dict()) == {"rule.table"}
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved.rule.table, loaded.rule.table)


def test_a_call_without_ids_or_with_others_is_refused():
    router = build_router("hash", 3, 4, 2, vocab_size=9)
    with pytest.raises(UserError, match="got no token_ids"):
        router.route(torch.randn(2, 3), RoutingCall())
    for ids in ([0, 9], [-1, 3]):
        with pytest.raises(UserError, match="in a hash table of 9; allowed: 0 to 8"):
            router.route(torch.randn(2, 3), call_with(ids))
    assert router.route(torch.randn(0, 3), call_with([])).assignment.experts.shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"frequencies": [1, 2]}, "2 frequencies with vocab_size 9"),
        ({"frequencies": [-1] + [1] * 8}, "a frequency below 0"),
        ({"frequencies": [math.nan] + [1.0] * 8}, "a frequency below 0"),
        ({"weights": "learnt"}, "did you mean 'learned'"),
        ({"weights": "learned", "scale": 0.0}, "scale 0.0"),
        ({"scale": 1.5}, "uniform weights have none"),
        ({"table": torch.tensor([[0, 0]])}, "an expert twice"),
        ({"table": torch.tensor([[0, 4]])}, "outside 0 to 3"),
        ({"table": torch.tensor([[0]])}, "1 experts per token with num_selected 2"),
    ],
)
def test_bad_input_is_refused(options: dict[str, object], said: str):
    with pytest.raises(UserError, match=said):
        build_router("hash", 3, 4, 2, **{"vocab_size": 9, **options})


def test_a_learned_gate_for_one_expert_is_refused():
    with pytest.raises(UserError, match="no gradient"):
        build_router("hash", 3, 4, 1, vocab_size=9, weights="learned")


def test_every_pair_of_experts_meets():
    # Consecutive places of one permutation would only ever make E / K teams.
    table = hash_table(400, 6, 2, seed=0)
    assert {tuple(sorted(row)) for row in table.tolist()} == set(itertools.combinations(range(6), 2))
