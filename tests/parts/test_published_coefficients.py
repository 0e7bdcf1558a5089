"""Published coefficients in our convention, worked by hand, and what is said to bad questions."""

from __future__ import annotations

import pytest

from gatewright.errors import UserError
from gatewright.parts.coefficients import coefficient_for, coefficients_for
from gatewright.parts.losses import LOSSES
from tests.parts.seen import stats_of

# What the published coefficients are here, worked by hand.
PUBLISHED: tuple[tuple[str, dict[str, int], dict[str, float]], ...] = (
    ("sparsely_gated", {"num_layers": 1}, {"importance": 0.1, "load": 0.1}),
    ("switch", {"num_layers": 12}, {"balance": 0.12}),
    ("glam", {"num_layers": 32}, {"gshard": 0.32}),
    ("vmoe", {"num_layers": 6}, {"importance": 0.03, "load": 0.03}),
    ("st_moe", {"num_layers": 12}, {"gshard": 0.12, "z": 0.012}),
    ("expert_choice", {}, {"balance": 0.0}),
    ("mixtral", {"num_selected": 2}, {"balance": 0.04}),
    ("qwen3", {"num_selected": 8}, {"balance": 0.008}),
    ("nllb", {"num_selected": 2}, {"balance": 0.002}),
    ("deepseek_moe", {"num_layers": 9}, {"balance": 0.09}),
    ("deepseek_moe_16b", {"num_layers": 27}, {"balance": 0.027}),
    ("deepseek_v2", {"num_layers": 59}, {"balance": 0.177, "device": 2.95, "communication": 1.18}),
    ("deepseek_v3", {"num_layers": 58}, {"sequence_balance": 0.0058}),
    ("olmoe", {}, {"balance": 0.01, "z": 0.001}),
    ("remoe", {}, {"relu": 1.0}),
)


@pytest.mark.parametrize(("name", "sizes", "weights"), PUBLISHED)
def test_published_coefficients(name: str, sizes: dict[str, int], weights: dict[str, float]):
    found = coefficients_for(name, **sizes)
    assert {one.loss: one.weight for one in found} == pytest.approx(weights)
    assert coefficient_for(name, **sizes) == found[0]
    assert {one.loss for one in found} <= set(LOSSES)


def test_the_reason_shows_the_arithmetic():
    found = coefficient_for("gshard", coefficient=0.64, num_experts=8, num_layers=4)
    assert found.weight == pytest.approx(0.04)
    assert found.why.endswith("0.64 * 0.015625 (num_experts 8) * 4 layers = 0.04")
    assert found.why.startswith("gshard: printed without E^2")


def test_bad_questions():
    with pytest.raises(UserError, match="coefficients 'swich' unknown; did you mean 'switch'"):
        coefficient_for("swich")
    with pytest.raises(UserError, match=r"loss of olmoe 'load' unknown.*allowed: balance, z"):
        coefficient_for("olmoe", "load")
    with pytest.raises(UserError, match=r"coefficient_for\('switch', 'balance'\) without num_layers"):
        coefficient_for("switch")
    with pytest.raises(UserError, match=r"without num_selected; allowed: 1 or more; .*sums to K"):
        coefficient_for("mixtral")
    with pytest.raises(UserError, match="gshard publishes no coefficient of its gshard loss; give yours"):
        coefficient_for("gshard", num_experts=4, num_layers=2)
    with pytest.raises(UserError, match="num_layers 0; allowed: 1 or more"):
        coefficient_for("switch", num_layers=0)
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="allowed: a finite number of 0 or more"):
            coefficient_for("olmoe", coefficient=bad)


def test_a_router_of_one_expert_has_no_unbiased_variance():
    assert coefficient_for("tutel", "load", coefficient=1.0, num_experts=1, num_layers=2).weight == 0
    assert stats_of([[0.0]])["router"].num_experts == 1
