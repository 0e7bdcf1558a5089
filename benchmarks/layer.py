"""One expert layer with its router against a dense layer of equal active FLOPs: forward and backward,
sides alternating.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gatewright.errors import RunFailure, UserError
from gatewright.parts import MLP, MoELayer, balance_loss
from gatewright.training.workplace import environment, now


class Shape(NamedTuple):
    """T tokens, D width, F expert width, E experts, K selected."""

    tokens: int
    width: int
    expert_width: int
    num_experts: int
    num_selected: int


GRIDS: dict[str, tuple[Shape, ...]] = {
    "small": (Shape(4096, 64, 64, 64, 4), Shape(4096, 128, 128, 64, 4), Shape(4096, 128, 256, 16, 2)),
    "wide": (
        Shape(2048, 512, 1024, 8, 2),
        Shape(2048, 512, 128, 64, 8),
        Shape(4096, 256, 512, 64, 1),
        Shape(4096, 64, 128, 64, 1),
        Shape(16384, 128, 256, 64, 2),
    ),
}

# Above this spread of the dense side, (90th - 10th percentile) / median, a ratio says more about the
# machine than about the layers.
LARGEST_SPREAD = 0.25


def dense_width(shape: Shape) -> int:
    """Return the dense layer's hidden width: K F, widened by the router's FLOPs (2 D E over 6 D per unit
    of width).
    """
    return shape.num_selected * shape.expert_width + round(shape.num_experts / 3)


def time_pair(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return raw seconds of both sides, the median of their paired ratios, and its 10th and 90th
    percentile.
    """
    torch.manual_seed(0)
    weights = "raw" if shape.num_selected == 1 else "renormalised"
    sparse = MoELayer(
        shape.width, shape.num_experts, shape.num_selected, shape.expert_width, weights=weights
    ).to(dtype)
    dense = MLP(shape.width, dense_width(shape)).to(dtype)
    x = torch.randn(shape.tokens, shape.width, dtype=dtype, requires_grad=True)
    grad = torch.randn(shape.tokens, shape.width, dtype=dtype)

    def run_sparse() -> None:
        y, stats = sparse(x)
        torch.autograd.backward([y, balance_loss(stats) * 0.01], [grad, torch.ones(())])

    def run_dense() -> None:
        dense(x).backward(grad)

    def seconds(side: Callable[[], None]) -> float:
        started = time.perf_counter()
        side()
        return time.perf_counter() - started

    for _ in range(3):
        run_sparse()
        run_dense()
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    for turn in range(rounds):
        pair = [("sparse", run_sparse), ("dense", run_dense)]
        for name, side in pair if turn % 2 else reversed(pair):
            times[name].append(seconds(side))
    ratios = sorted(s / d for s, d in zip(times["sparse"], times["dense"], strict=True))
    low, high = ratios[round(0.1 * (rounds - 1))], ratios[round(0.9 * (rounds - 1))]
    ordered = sorted(times["dense"])
    spread = (ordered[round(0.9 * (rounds - 1))] - ordered[round(0.1 * (rounds - 1))]) / statistics.median(
        ordered
    )
    return {
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "dense_spread": spread,
        "seconds": times,
    }


def run_grid(name: str, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return every row of a grid. Raises: UserError below 11 rounds; RunFailure if no row was quiet enough
    to print.
    """
    if rounds < 11:
        raise UserError(f"rounds {rounds}; allowed: 11 or more; fewer say nothing on a shared machine")
    say("tokens  width  F     E    K   dtype      sparse/dense  (10th to 90th percentile)")
    rows = []
    for shape in GRIDS[name]:
        for dtype in (torch.float32, torch.bfloat16):
            row = time_pair(shape, dtype, rounds)
            rows.append(row)
            head = " ".join(f"{value:<{room}d}" for value, room in zip(shape, (7, 6, 5, 4, 3), strict=True))
            if row["dense_spread"] > LARGEST_SPREAD:
                say(
                    f"{head} {row['dtype']:10s} not printed: the dense side alone spread by "
                    f"{100 * row['dense_spread']:.0f} %"
                )
            else:
                say(
                    f"{head} {row['dtype']:10s} {row['ratio']:.2f}          ({row['low']:.2f} to "
                    f"{row['high']:.2f})"
                )
    if all(row["dense_spread"] > LARGEST_SPREAD for row in rows):
        raise RunFailure(
            "the machine is too busy: in every row the dense side alone spread by more than 25 %; run "
            "again alone"
        )
    return {
        "schema": "gatewright.bench.layer.v1",
        "grid": name,
        "environment": environment("cpu"),
        "created": now(),
        "rows": rows,
    }
