"""DeepSeek's routers by name: numbers worked by hand, the published groups, and limits that hold."""

from __future__ import annotations

import math

import pytest
import torch

from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, build_router


def test_v2_scales_what_it_does_not_renormalise():
    # exp of ln 5, ln 2, ln 2, 0 over 10: .5, .2, .2, .1; two chosen, times 16.
    router = build_router("deepseek_v2", 4, 4, 2, scale=16.0).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    logits = torch.tensor([[math.log(5), math.log(2), math.log(2), 0.0]], dtype=torch.float64)
    chosen = router.route(logits, RoutingCall()).assignment
    assert chosen.experts.tolist() == [[0, 1]]
    assert chosen.weights[0].tolist() == pytest.approx([8.0, 3.2])


def test_v4_by_hand():
    # sqrt(softplus): sqrt(ln 2) = .8326, sqrt(ln(1 + e)) = sqrt(1.3133) = 1.1460; over their sum, times 1.5.
    router = build_router("deepseek_v4", 2, 2, 2).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    chosen = router.route(torch.tensor([[0.0, 1.0]], dtype=torch.float64), RoutingCall()).assignment
    assert chosen.experts.tolist() == [[1, 0]]
    assert chosen.weights[0].tolist() == pytest.approx([0.8688, 0.6312], abs=5e-5)


@pytest.mark.parametrize(
    ("name", "num_experts", "num_selected", "groups"),
    [
        ("deepseek_v3", 256, 8, (8, 4)),
        ("deepseek_v3", 16, 8, (8, 4)),
        ("deepseek_v3", 16, 9, (1, 1)),
        ("deepseek_v3", 20, 2, (1, 1)),
        ("deepseek_v3", 8, 2, (1, 1)),
        ("deepseek_v2", 160, 6, (8, 3)),
        ("deepseek_v4", 256, 6, (1, 1)),
        ("device_limited", 160, 6, (8, 3)),
        ("device_limited", 8, 2, (4, 3)),
        ("device_limited", 8, 7, (4, 4)),
        ("device_limited", 6, 2, (2, 2)),
        ("device_limited", 1, 1, (1, 1)),
    ],
)
def test_groups_are_the_published_ones_where_they_fit(name, num_experts, num_selected, groups):
    rule = build_router(name, 4, num_experts, num_selected).rule
    assert (rule.num_groups, rule.groups_kept) == groups


def test_the_deepseek_routers_are_what_the_papers_say():
    v3, moe = build_router("deepseek_v3", 4, 16, 4), build_router("deepseek_moe", 4, 16, 4)
    assert (v3.rule.group_score, v3.rule.weights, v3.rule.scale) == ("top2", "renormalised", 2.5)
    assert (v3.rule.bias.rate, v3.rule.bias.rule) == (0.001, "sign")
    assert set(v3.state_dict()) == {"weight", "rule.bias.bias", "rule.bias.updates"}
    assert (moe.rule.weights, moe.rule.scale) == ("raw", 1.0)
    v2 = build_router("deepseek_v2", 4, 16, 4).rule
    assert (v2.group_score, v2.weights, v2.scale, v2.bias) == ("max", "raw", 1.0, None)
    v2.update(torch.zeros(16, dtype=torch.int64), 0)
    v3.rule.update(torch.arange(16), 30)
    assert v3.rule.bias.bias[0] > 0 > v3.rule.bias.bias[15]


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "device_limited"])
def test_no_token_goes_to_more_groups_than_it_keeps(name: str):
    torch.manual_seed(0)
    layer = MoELayer(8, 32, 6, 4, router=name)
    _, stats = layer(torch.randn(64, 8), capture=True)
    record, rule = stats["router"], layer.router.rule
    visited = [len({e // 4 for e in row}) for row in record.experts.tolist()]
    assert max(visited) == rule.groups_kept < 6
    assert int(record.sums["device_counts"].sum()) == sum(visited)


def test_groups_without_how_many_are_kept_are_refused():
    with pytest.raises(UserError, match="allowed: both or neither"):
        build_router("deepseek_v3", 4, 32, 4, num_groups=4)
    rule = build_router("deepseek_v3", 4, 8, 4, num_groups=4, groups_kept=2).rule
    assert (rule.num_groups, rule.groups_kept) == (4, 2)
