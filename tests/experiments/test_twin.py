"""Dense twins of equal compute, and of equal size: within 1 % for every pattern, and worked by hand once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gatewright.errors import UserError
from gatewright.experiments.twin import Against, cost_of, dense_twin
from gatewright.papers import get_paper
from gatewright.papers.mixtral import Settings

PATTERNS = ("all", "every:2", "first_dense:1", "last:1")
PER_LAYER: dict[str, Any] = {
    "num_experts": (4, 16, 8),
    "expert_width": (96, 32, 64),
    "ffn_width": (100, 200, 300),
    "num_layers": 3,
}


def settings_of(paper: str, pattern: str, per_layer: bool) -> Any:
    settings = get_paper(paper).Settings(moe_layers=pattern)
    if not per_layer:
        return settings
    more = {"num_selected": (2, 4, 3)} if hasattr(settings, "num_selected") else {}
    return dataclasses.replace(settings, **PER_LAYER, **more)


@pytest.mark.parametrize(
    "paper", ["sparsely_gated", "mixtral", "switch", "olmoe", "deepseek_v2", "deepseek_v3"]
)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_twin_equals_what_it_is_matched_in(paper: str, pattern: str, per_layer: bool):
    settings = settings_of(paper, pattern, per_layer)
    sparse = cost_of(paper, settings)
    active = cost_of(paper, dense_twin(paper, settings, "active"))
    total = cost_of(paper, dense_twin(paper, settings, "total"))
    assert active.forward_flops_per_token == pytest.approx(sparse.forward_flops_per_token, rel=0.01)
    assert total.total_parameters == pytest.approx(sparse.total_parameters, rel=0.01)
    for twin in (active, total):
        assert twin.active_parameters == twin.total_parameters
        assert twin.flops["router"] == twin.flops["experts"] == 0
    assert sparse.flops["router"] > 0
    # As many numbers as the cost says, in a model that is really built.
    built = get_paper(paper).build(dense_twin(paper, settings, "active"))
    assert sum(p.numel() for p in built.parameters()) == active.total_parameters


@pytest.mark.parametrize(
    "paper", ["sparsely_gated", "mixtral", "switch", "olmoe", "deepseek_v2", "deepseek_v3"]
)
@pytest.mark.parametrize("against", ["active", "total"])
def test_dense_layers_keep_their_width(paper: str, against: Against):
    settings = dataclasses.replace(settings_of(paper, "every:2", per_layer=True), moe_layers="every:2")
    widths = dense_twin(paper, settings, against).ffn_width
    assert (widths[0], widths[2]) == (100, 300)
    assert dense_twin(paper, settings, against).moe_layers == "none"


def test_the_twin_s_widths_by_hand():
    settings = Settings(
        vocab_size=100,
        width=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        num_experts=9,
        num_selected=2,
        expert_width=20,
        context=15,
    )
    sparse = cost_of("mixtral", settings)
    # A multiply-add is 2. Per layer: query and output 2 x 48 x 16, key and value 2 x 48 x 8; 8 keys on mean
    # for 2 heads of 8, twice; the router 48 x 9; two experts of 3 x 48 x 20; in the end 48 x 100.
    layer = 2 * (2 * 48 * 16 + 2 * 48 * 8) + 2 * 2 * 8 * 2 * 8 + 2 * 48 * 9 + 2 * 2 * 3 * 48 * 20
    assert sparse.forward_flops_per_token == 2 * layer + 2 * 48 * 100
    # The router's 2 x 48 x 9 are those of 9 / 3 units of a SwiGLU layer (2 x 3 x 48 each): 2 x 20 + 3.
    assert dense_twin("mixtral", settings, "active").ffn_width == (43, 43)
    # In size: nine experts, and as many weights as the router's in 3 units.
    assert dense_twin("mixtral", settings, "total").ffn_width == (183, 183)
    assert cost_of("mixtral", dense_twin("mixtral", settings, "active")).forward_flops_per_token == (
        sparse.forward_flops_per_token
    )


def test_what_is_left_over_goes_to_the_first_layers():
    settings = Settings(num_experts=7, num_selected=2, num_layers=2)
    # 2 x 64 + 7 / 3 in each of two layers: 4.67 units more, that is 5.
    assert dense_twin("mixtral", settings, "active").ffn_width == (131, 130)


def test_a_model_without_sparse_layers_is_refused():
    with pytest.raises(UserError, match="the model has no sparse layer; allowed: a sparse model"):
        dense_twin("mixtral", Settings(moe_layers="none"))


def test_a_model_too_small_for_one_percent_is_refused():
    # One unit of width is more than 1 % of all that there is.
    tiny = Settings(2, 2, 1, 1, 1, 2, 5, 2, 1, "all", 1, 1)
    with pytest.raises(
        UserError, match=r"the nearest dense twin has .* allowed: within 1 %; choose a larger"
    ):
        dense_twin("mixtral", tiny)
