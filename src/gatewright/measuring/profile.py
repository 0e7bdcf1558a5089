"""Where our layer's time goes: seconds of each part of one call, by torch's profiler."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

from gatewright.measuring.grid import DTYPES, Cell
from gatewright.measuring.sides import OURS, build_sides

WARM_UPS, CALLS = 2, 7
# Which part an operator belongs to: the first whose word its name holds. Under autograd the forward pass of
# an operator runs inside a wrapper named after its backward pass.
PARTS = (
    ("experts, backward", "experts_backward"),
    ("experts, forward", "experts_forward"),
    ("router's map, backward", "maps_backward"),
    ("router's map, forward", "maps_forward"),
    ("routing, backward", "route_backward"),
    ("routing, forward", "route"),
    ("plan", "plan_rows"),
)
REST = "all else"


def part_of(name: str) -> str:
    """Return the part that an operator of torch's profiler belongs to."""
    return next((part for part, word in PARTS if f"gatewright::{word}" in name or f"_{word}_" in name), REST)


def profile_layer(cell: Cell, backend: str | None) -> dict[str, float]:
    """Return the seconds of each part of our layer, medians over calls; operators that ran inside others are
    counted once, as their own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        side = build_sides(cell, backend, [OURS])[OURS]
        x, grad = torch.randn(2, cell.shape.tokens, cell.shape.width).to(DTYPES[cell.dtype])
    turn = side.turn(x.clone().requires_grad_(), grad, cell.kind, keep_gradients=False)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every call writes lines of its own to stderr
    calls: list[dict[str, float]] = []
    for _ in range(WARM_UPS + CALLS):
        turn.clear()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            turn.call()
        calls.append(_by_part((event.key, event.self_cpu_time_total) for event in seen.key_averages()))
    return {
        part: statistics.median(call.get(part, 0.0) for call in calls[WARM_UPS:])
        for part in (*(part for part, _ in PARTS), REST)
    }


def _by_part(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return seconds by part, from names and microseconds."""
    found: dict[str, float] = {}
    for name, microseconds in events:
        part = part_of(name)
        found[part] = found.get(part, 0.0) + microseconds / 1e6
    return found


def profile_text(parts: Mapping[str, float]) -> str:
    """Return each part's milliseconds and share, the largest first."""
    whole = sum(parts.values())
    order = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {1e3 * took:.2f} ms ({took / whole:.0%})" for part, took in order if took > 0)
