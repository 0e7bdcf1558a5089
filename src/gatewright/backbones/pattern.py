"""Which layers are mixtures, and settings that take one value or one per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from gatewright.errors import UserError

V = TypeVar("V", int, float)

_ALLOWED = "all, none, every:N (each N-th layer), first_dense:N (all but the first N), last:N"


def moe_pattern(pattern: str, num_layers: int) -> tuple[bool, ...]:
    """Return for each layer whether its feed-forward layer is a mixture.

    "every:2" makes layers 1, 3, 5, ... sparse (0-based), as Switch and GShard do; "first_dense:1" keeps layer
    0 dense (DeepSeekMoE); "last:2" makes the last two sparse (V-MoE).
    """
    if num_layers < 1:
        raise UserError(f"num_layers {num_layers}; allowed: 1 or more")
    name, _, number = pattern.partition(":")
    if pattern in ("all", "none"):
        return (pattern == "all",) * num_layers
    if (
        name not in ("every", "first_dense", "last")
        or not number.isdecimal()
        or (name == "every" and int(number) < 1)
    ):
        raise UserError(f"moe_layers {pattern!r} is unknown; allowed: {_ALLOWED}")
    n = int(number)
    if n > num_layers:
        raise UserError(
            f"moe_layers {pattern!r} with {num_layers} layers; allowed: a number of at most {num_layers}"
        )
    if name == "every":
        return tuple(i % n == n - 1 for i in range(num_layers))
    if name == "first_dense":
        return tuple(i >= n for i in range(num_layers))
    return tuple(i >= num_layers - n for i in range(num_layers))


def per_layer(name: str, value: V | Sequence[V], num_layers: int) -> tuple[V, ...]:
    """Return one value per layer from one value, or from a sequence that has one for every layer."""
    if isinstance(value, (int, float)):
        return (value,) * num_layers
    values = tuple(value)
    if len(values) == 1:
        return values * num_layers
    if len(values) != num_layers:
        raise UserError(
            f"{name} has {len(values)} values for {num_layers} layers; allowed: one value, or one per "
            "layer (also for dense layers)"
        )
    return values
