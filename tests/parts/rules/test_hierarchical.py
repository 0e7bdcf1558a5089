"""Two levels: groups, then experts inside; products of gates, importance and load over all experts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.backbones import initialise
from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, build_router
from gatewright.parts.draws import fold, normal
from gatewright.parts.noise import LOGIT_NOISE, PRIMARY_NOISE
from gatewright.parts.rules.hierarchical import HierarchicalRouter, two_levels
from tests.oracle import hierarchical as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same
from tests.parts.rules.noisy_cases import CPU, draw_weights, twin
from tests.parts.rules.test_noisy_top_k import still

LN2 = math.log(2)
LEVELS = (LN2, 0.0, -LN2)


def seen_router(**options: object) -> HierarchicalRouter:
    """Return 3 groups of 3 experts, 2 of each: a token is its 3 logits of groups and 9 of experts."""
    router = build_router("hierarchical", 12, 9, 4, num_groups=3, **options).double()
    assert isinstance(router, HierarchicalRouter)
    with torch.no_grad():
        router.primary.copy_(torch.eye(12)[:3])
        router.weight.copy_(torch.eye(12)[3:])
    return router


def token(groups: tuple[float, ...], *inside: tuple[float, ...]) -> Tensor:
    return torch.tensor([[*groups, *(value for row in inside for value in row)]], dtype=torch.float64)


def test_gates_multiply_by_hand():
    # Groups: e^h = 3, 1, e^-5: 3/4 and 1/4 for the first two. Inside group 0: 4 : 1 for its first two, so
    # 4/5 and 1/5; inside group 1: 1 : 1 for its last two.
    x = token((math.log(3), 0, -5), (math.log(4), 0, -9), (-9, 0, 0), (1, 2, 3))
    found = seen_router().route(x, RoutingCall()).assignment
    assert found.experts.tolist() == [[0, 1, 4, 5]]
    torch.testing.assert_close(found.weights, torch.tensor([[0.6, 0.15, 0.125, 0.125]]).double())
    assert not found.sums


def test_scores_are_the_product_of_both_softmaxes():
    router = seen_router()
    x = token((LN2, 0, 0), LEVELS, LEVELS, LEVELS)
    routed = router.route(x, RoutingCall())
    # (1/2, 1/4, 1/4) times 2 : 1 : 1/2 = (4/7, 2/7, 1/7).
    inside = torch.tensor([4, 2, 1]).double() / 7
    expected = torch.cat([inside / 2, inside / 4, inside / 4]).unsqueeze(0)
    torch.testing.assert_close(routed.scores, expected)
    torch.testing.assert_close(torch.softmax(router(x), dim=-1), expected)


def test_importance_and_load_by_hand(monkeypatch: pytest.MonkeyPatch):
    still(monkeypatch)
    # Logits in units of the standard deviation, ln 2. K1 = 2 of (1, 0, -1): the second best of the others is
    # -1, -1, 0, so that z = 2, 1, -1 and Phi = .97725, .84134, .15866. Inside each group the same.
    high, middle, low = 0.97725, 0.84134, 0.15866
    one, other = token(LEVELS, *[LEVELS] * 3), token(LEVELS[::-1], *[LEVELS] * 3)
    call = RoutingCall(training=True, key=torch.tensor(0))
    found = seen_router().route(torch.cat([one, other]), call).assignment
    # The first token takes groups 0 and 1, the second 2 and 1; |X| = 1, 2, 1.
    # Loadprim = (high + low, 2 middle, low + high); Load_i(X_i) = |X_i| (high, middle, low), so |X| goes out.
    outer = torch.tensor([high + low, 2 * middle, low + high]).double()
    inner = torch.tensor([high, middle, low]).double()
    expected = (outer.unsqueeze(1) * inner).flatten()
    torch.testing.assert_close(found.sums["load"], expected, rtol=0, atol=3e-5)
    # Gates: 2/3 and 1/3 at each level.
    share = torch.tensor([2 / 3, 2 / 3, 2 / 3]).double()
    expected = (share.unsqueeze(1) * torch.tensor([2 / 3, 1 / 3, 0]).double()).flatten()
    torch.testing.assert_close(found.sums["importance"], expected)


def test_a_group_that_no_token_chooses_has_no_load(monkeypatch: pytest.MonkeyPatch):
    still(monkeypatch)
    call = RoutingCall(training=True, key=torch.tensor(0))
    found = seen_router().route(token(LEVELS, *[LEVELS] * 3), call).assignment
    assert found.sums["load"][6:].tolist() == [0, 0, 0]
    assert found.sums["load"][:6].all()


def test_padding_enters_no_sum():
    torch.manual_seed(0)
    router = HierarchicalRouter(5, 9, 4, zero_init=False)
    x, mask = torch.randn(6, 5), torch.tensor([True, True, True, True, False, False])
    key = torch.tensor(3)
    # The first four tokens' noise is the same, since an element's depends on its place alone.
    alone = router.route(x[:4], RoutingCall(training=True, key=key)).assignment.sums
    padded = router.route(x, RoutingCall(mask, training=True, key=key)).assignment.sums
    for name in ("importance", "load"):
        torch.testing.assert_close(padded[name], alone[name])


def test_the_load_teaches_the_first_level():
    router = build_router("hierarchical", 5, 9, 4)
    assert isinstance(router, HierarchicalRouter)
    routed = router.route(torch.randn(30, 5), RoutingCall(training=True, key=torch.tensor(1)))
    routed.assignment.sums["load"].square().sum().backward()
    for weight in (router.primary, router.weight, router.primary_noise.weight, router.noise.weight):
        assert weight.grad is not None
        assert weight.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_one_group_is_noisy_top_k(training: bool):
    flat = build_router("noisy_top_k", 5, 6, 3, zero_init=False)
    with torch.no_grad():
        flat.noise.weight.normal_()
    router = build_router("hierarchical", 5, 6, 3, num_groups=1)
    router.load_state_dict(flat.state_dict())
    call = RoutingCall(training=training, key=torch.tensor(3))
    x = torch.randn(20, 5)
    mine, other = router.route(x, call), flat.route(x, call)
    assert torch.equal(mine.logits, other.logits)
    assert torch.equal(mine.scores, other.scores)
    assert torch.equal(mine.assignment.experts, other.assignment.experts)
    torch.testing.assert_close(mine.assignment.weights, other.assignment.weights)
    assert mine.assignment.sums.keys() == other.assignment.sums.keys()
    for name, value in other.assignment.sums.items():
        torch.testing.assert_close(mine.assignment.sums[name], value)


def test_both_levels_draw_noise_of_their_own_and_start_at_zero():
    layer = MoELayer(4, 16, 4, 3, router="hierarchical")
    assert not any(parameter.any() for parameter in layer.router.parameters())
    _, stats = layer(torch.randn(4096, 4), key=torch.tensor(2))
    # Uniform at random: each expert 4096 * 4 / 16 = 1024 times, standard deviation at most sqrt(1024 * 3/4).
    assert ((stats["router"].counts - 1024).abs() < 4 * 27.7).all()
    drawn = build_router("hierarchical", 64, 16, 4, zero_init=False)
    assert isinstance(drawn, HierarchicalRouter)
    assert drawn.primary.std().item() == pytest.approx(1 / 8, rel=0.3)
    assert drawn.weight.std().item() == pytest.approx(1 / 8, rel=0.2)
    quiet = build_router("hierarchical", 4, 16, 4, noise=False)
    routed = quiet.route(torch.randn(9, 4), RoutingCall(training=True))
    assert routed.assignment.experts[0].tolist() == [0, 1, 4, 5]
    assert not routed.assignment.sums


def test_a_backbones_initialisation_leaves_zeros_where_they_are_wanted():
    for zero_init in (True, False):
        layer = MoELayer(6, 8, 4, 3, router=build_router("hierarchical", 6, 8, 4, zero_init=zero_init))
        initialise.fan_in(layer)
        assert bool(layer.router.weight.any()) is not zero_init
        assert not layer.router.noise.weight.any()


def test_levels_by_default():
    # The least divisor of E of sqrt(E) or more; K parted as evenly as it goes, the smaller part first.
    for (num_experts, num_selected), expected in {
        (256, 4): (16, 2),
        (8, 4): (4, 2),
        (64, 8): (8, 2),
        (64, 16): (8, 4),
        (12, 6): (4, 2),
        (7, 3): (7, 3),
        (1, 1): (1, 1),
    }.items():
        assert two_levels(num_experts, num_selected) == expected
    assert two_levels(64, 8, num_groups=16, num_primary=4) == (16, 4)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Draw a groups of b experts, K1 and K2."""
    a, b = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return a, b, draw(st.integers(min(a, 2), a)), draw(st.integers(min(b, 2), b))


@repeatable(200)
@given(
    size=sizes(),
    num_tokens=st.integers(0, 3),
    masked=st.booleans(),
    training=st.sampled_from((True, True, False)),
    epsilon=st.sampled_from((0.0, 0.01)),
    seed=st.integers(0, 10_000),
)
def test_equals_the_oracle(size, num_tokens, masked, training, epsilon, seed):
    a, b, first, second = size
    source = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_tokens, generator=source) < 0.6 if masked else None
    call = RoutingCall(mask=mask, training=training, key=torch.tensor(seed))
    router = build_router(
        "hierarchical", 3, a * b, first * second, num_groups=a, num_primary=first, epsilon=epsilon
    )
    assert isinstance(router, HierarchicalRouter)
    draw_weights(router, seed)
    x = twin(torch.randn(num_tokens, 3, generator=source, dtype=torch.float64))
    own = [x, router.weight, router.noise.weight]
    if a > 1:
        own += [router.primary, router.primary_noise.weight]
    theirs = [twin(leaf) for leaf in own]
    outer = theirs[3:] if a > 1 else [torch.zeros(1, 3, dtype=torch.float64)] * 2
    weights = oracle.Weights(outer[0], outer[1], theirs[1], theirs[2], training)
    lots = (
        normal(fold(call.key, PRIMARY_NOISE, LOGIT_NOISE), (num_tokens, a), CPU, torch.float64),
        normal(fold(call.key, LOGIT_NOISE), (num_tokens, a * b), CPU, torch.float64),
    )
    sums, choices = oracle.totals(a * b, a), []
    for t in range(num_tokens):
        draws = (lots[0][t], lots[1][t])
        real = mask is None or bool(mask[t])
        chosen = (
            oracle.route(theirs[0][t], weights, draws, (first, second), epsilon, sums) if real else ([], [])
        )
        choices.append(chosen)
    found = router.route(x, call).assignment
    wanted = {"importance": sums.importance, "load": sums.load()} if training else {}
    assert found.sums.keys() == wanted.keys()
    compared = [(found.sums[name], torch.stack(values)) for name, values in wanted.items()]
    assert_same(found, choices, list(zip(own, theirs, strict=True)), compared)


def test_levels_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="num_groups 3 with num_experts 8; allowed: 1, 2, 4, 8"):
        build_router("hierarchical", 8, 8, 4, num_groups=3)
    with pytest.raises(
        UserError, match="num_selected 2 with 4 groups of 2 experts; allowed: K = 2 x 2 and more"
    ):
        build_router("hierarchical", 8, 8, 2)
    with pytest.raises(
        UserError, match="num_selected 8, num_primary 8 with 8 groups of 8 experts; allowed: num_p"
    ):
        build_router("hierarchical", 8, 64, 8, num_primary=8)
    with pytest.raises(UserError, match="num_selected 9 with num_experts 8"):
        build_router("hierarchical", 8, 8, 9)
