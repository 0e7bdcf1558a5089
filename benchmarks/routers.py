"""Time every named router against plain token choice: x to Assignment and back, sides alternating."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gatewright.errors import UserError
from gatewright.parts import RouterInfo, RoutingCall, all_routers, build_router
from gatewright.training.workplace import environment, now

TOKENS, WIDTH, NUM_EXPERTS, NUM_SELECTED = 16_384, 256, 64, 2


def _side(name: str, tokens: int, num_selected: int) -> Callable[[], float]:
    """Return a function that routes forward and backward once and says how many seconds it took."""
    torch.manual_seed(0)
    num_experts = 1 if name == "mixture_of_depths" else NUM_EXPERTS
    router = build_router(name, WIDTH, num_experts, num_selected)
    with torch.no_grad():
        router.weight.normal_(std=WIDTH**-0.5)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    call = RoutingCall(training=True, key=torch.tensor(1), token_ids=torch.randint(256, (tokens,)))

    def run() -> float:
        started = time.perf_counter()
        routed = router.route(x, call)
        own = [value.sum() for value in routed.assignment.sums.values() if value.requires_grad]
        total = routed.assignment.weights.sum() + routed.probabilities.sum() + sum(own)
        if total.requires_grad:
            total.backward()
        return time.perf_counter() - started

    return run


def selected_by(info: RouterInfo) -> int:
    """Return the K that a router is timed with: its own, or NUM_SELECTED."""
    own = {"dense": NUM_EXPERTS, "mixture_of_depths": 1, "hierarchical": 4}
    return info.fixed_selected or own.get(info.name, NUM_SELECTED)


def time_router(info: RouterInfo, rounds: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Return the ratio of one router's time to plain token choice of the same K (2 for the dense rule)."""
    selected = selected_by(info)
    plain = "token_choice_raw" if selected == 1 else "token_choice"
    of_plain = NUM_SELECTED if selected == NUM_EXPERTS else selected
    sides = {"plain": _side(plain, tokens, of_plain), "own": _side(info.name, tokens, selected)}
    times: dict[str, list[float]] = {"plain": [], "own": []}
    for side in sides.values():
        side()
    for turn in range(rounds):
        for name in ("plain", "own") if turn % 2 else ("own", "plain"):
            times[name].append(sides[name]())
    ratios = sorted(own / plain for plain, own in zip(times["plain"], times["own"], strict=True))
    return {
        "router": info.name,
        "num_selected": selected,
        "ratio": statistics.median(ratios),
        "low": ratios[round(0.1 * (rounds - 1))],
        "high": ratios[round(0.9 * (rounds - 1))],
        "seconds": times,
    }


def run_routers(rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return a row per named router. Raises: UserError below 11 rounds."""
    if rounds < 11:
        raise UserError(f"rounds {rounds}; allowed: 11 or more; fewer say nothing on a shared machine")
    say(f"{TOKENS} tokens of width {WIDTH}, {NUM_EXPERTS} experts; time over token choice (10th to 90th)")
    rows = []
    for info in all_routers():
        # BASE solves an assignment problem: seconds, said so, and not worth eleven of them.
        row = time_router(info, 1 if info.name == "base" else rounds)
        rows.append(row)
        say(f"{row['router']:20s} {row['ratio']:6.2f}  ({row['low']:.2f} to {row['high']:.2f})")
    return {
        "schema": "gatewright.bench.routers.v1",
        "environment": environment("cpu"),
        "created": now(),
        "rows": rows,
    }
