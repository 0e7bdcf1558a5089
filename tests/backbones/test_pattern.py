"""Which layers are mixtures, listed by hand, and settings of one value or one per layer."""

from __future__ import annotations

import pytest

from gatewright.backbones import moe_pattern, per_layer
from gatewright.errors import UserError

S, D = True, False


@pytest.mark.parametrize(
    ("pattern", "num_layers", "expected"),
    [
        ("all", 3, (S, S, S)),
        ("none", 3, (D, D, D)),
        ("every:1", 3, (S, S, S)),
        ("every:2", 5, (D, S, D, S, D)),
        ("every:4", 6, (D, D, D, S, D, D)),
        ("first_dense:0", 2, (S, S)),
        ("first_dense:1", 4, (D, S, S, S)),
        ("first_dense:3", 4, (D, D, D, S)),
        ("first_dense:2", 2, (D, D)),
        ("last:2", 4, (D, D, S, S)),
        ("last:0", 2, (D, D)),
        ("last:2", 2, (S, S)),
    ],
)
def test_patterns_by_hand(pattern: str, num_layers: int, expected: tuple[bool, ...]):
    assert moe_pattern(pattern, num_layers) == expected


@pytest.mark.parametrize(
    "pattern",
    ["", "every", "every:", "every:0", "every:-1", "every:x", "All", "last:2:1", "sparse:2", "every:1.5"],
)
def test_unknown_patterns_are_refused_with_what_is_allowed(pattern: str):
    with pytest.raises(UserError, match=r"is unknown; allowed: all, none, every:N"):
        moe_pattern(pattern, 4)


@pytest.mark.parametrize("pattern", ["every:5", "first_dense:5", "last:5"])
def test_a_number_beyond_the_layers_is_refused(pattern: str):
    with pytest.raises(UserError, match="with 4 layers"):
        moe_pattern(pattern, 4)


def test_one_value_or_one_per_layer():
    assert per_layer("num_experts", 8, 3) == (8, 8, 8)
    assert per_layer("num_experts", (8,), 3) == (8, 8, 8)
    assert per_layer("num_experts", (2, 4, 8), 3) == (2, 4, 8)
    assert per_layer("num_experts", [2, 4], 2) == (2, 4)
    with pytest.raises(UserError, match="num_experts has 2 values for 3 layers"):
        per_layer("num_experts", (2, 4), 3)
