"""Named routers: built by name, unknown names and options refused, and a rule from outside taken in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gatewright.errors import UserError
from gatewright.parts import MoELayer, Router, TokenChoice, all_routers, build_router, register, router_info
from gatewright.parts.rules import registry


def test_names_are_unique_sorted_and_found():
    names = [info.name for info in all_routers()]
    assert names == sorted(set(names))
    assert all(router_info(name).name == name for name in names)
    assert {"dense", "switch", "gshard", "expert_choice", "deepseek_v3", "sinkhorn", "base"} <= set(names)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: build_router("deepseek_v33", 8, 4, 2), "router 'deepseek_v33' is unknown; did you mean"),
        (lambda: build_router("token_choice", 8, 4, 2, scal=2.0), "option 'scal' of router 'token_choice'"),
        (lambda: build_router("gshard", 8, 4, 3), "num_selected 3; allowed: 2"),
        (lambda: build_router("token_choice", 8, 4, 5), "num_selected 5 with num_experts 4; allowed: 1 to 4"),
        (lambda: MoELayer(8, 4, 2, 4, router="nobody"), "router 'nobody' is unknown"),
        (lambda: Router(8, 4).route(torch.ones(1, 8), registry_call()), "no rule to select by"),
    ],
)
def test_mistakes_get_one_line(call, line: str):
    with pytest.raises(UserError, match=line) as caught:
        call()
    assert "\n" not in str(caught.value)


def registry_call():
    from gatewright.parts import RoutingCall

    return RoutingCall()


def test_a_rule_from_outside_is_taken_like_our_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_ROUTERS", dict(registry._ROUTERS))

    def make(width, num_experts, num_selected, dtype=torch.float32):
        return Router(width, num_experts, dtype, rule=TokenChoice(num_selected, "raw"), scores="sigmoid")

    info = dataclasses.replace(router_info("token_choice"), name="mine", make=make)
    register(info)
    y, stats = MoELayer(8, 4, 2, 4, router="mine")(torch.randn(3, 8))
    assert y.shape == (3, 8)
    assert int(stats["router"].counts.sum()) == 6
    with pytest.raises(ValueError, match="registered twice"):
        register(info)
