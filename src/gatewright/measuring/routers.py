"""Time every named router against plain token choice: x to plan and record and back, sides alternating."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.measuring.rounds import Turn, check_rounds, paired, time_rounds
from gatewright.measuring.run import Allocator
from gatewright.parts import MoELayer, RouterInfo, all_routers
from gatewright.parts.record import record_call
from gatewright.training.checkpoint import write_atomic
from gatewright.training.runlog import Progress
from gatewright.training.workplace import command_line, environment, now, own_folder

TOKENS, WIDTH, NUM_EXPERTS, NUM_SELECTED = 16_384, 256, 64, 2
OWN, PLAIN = "own", "plain"


@dataclass(frozen=True)
class RoutersRun:
    """Time every named router against plain token choice, forward and backward."""

    whole_layer: bool = False
    """the layer that the router stands in, experts included, instead of the router alone"""
    rounds: int = 15
    """rounds per router, 11 or more; in each of them both sides run once"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    allocator: Allocator = "kept"
    """big blocks of freed memory stay in the process (kept) or go back to the system (default)"""
    out: str = "runs/bench"
    """folder of the result: routers.json"""

    def __post_init__(self) -> None:
        check_rounds(self.rounds)


@dataclass(frozen=True)
class RoutersResult:
    """A row per router; `record` is what routers.json holds."""

    record: Mapping[str, Any]
    path: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**self.record, "files": [self.path]}

    def check(self) -> None:
        """Nothing here is refused; the range of each ratio says how quiet the machine was."""

    def to_text(self) -> str:
        """Return a line per router."""
        what = "whole layer" if self.record["settings"]["whole_layer"] else "router alone"
        head = (
            f"{what}: {TOKENS} tokens of width {WIDTH}, {NUM_EXPERTS} experts; "
            "time over token choice (10th to 90th)"
        )
        return "\n".join([head, *map(router_line, self.record["rows"]), "", self.path])


def router_line(row: Mapping[str, Any]) -> str:
    """Return one router's ratio as a line."""
    return f"{row['router']:20s} {row['ratio']:6.2f}  ({row['low']:.2f} to {row['high']:.2f})"


def bench_routers(run: RoutersRun, say: Callable[[str], None] | None = None) -> RoutersResult:
    """Time every named router, write `routers.json`, and return the result.

    Threads and allocator are the process's own. Args: `say` takes a line of progress per router; None
    writes to stderr.
    """
    say = say or Progress("bench").say
    with own_folder(Path(run.out)) as out:
        rows = []
        for info in all_routers():
            if run.whole_layer and info.name == "dense":
                continue  # it computes every expert: its layer's time is not its router's
            # BASE solves an assignment problem: seconds, said so, and not worth eleven of them.
            rounds = 1 if info.name == "base" else run.rounds
            for at_start in (False, True) if info.name == "remoe" else (False,):
                rows.append(time_router(info, rounds, whole_layer=run.whole_layer, at_start=at_start))
                say(router_line(rows[-1]))
        record = {
            "schema": "gatewright.bench.routers.v1",
            "command": command_line(),
            "created": now(),
            "environment": environment("cpu"),
            "settings": {
                "whole_layer": run.whole_layer,
                "rounds": run.rounds,
                "allocator": run.allocator,
            },
            "rows": rows,
        }
        write_atomic(out / "routers.json", json.dumps(record, indent=1) + "\n")
    return RoutersResult(record, str(out / "routers.json"))


def selected_by(info: RouterInfo) -> int:
    """Return the K that a router is timed with: its own, or NUM_SELECTED."""
    own = {"dense": NUM_EXPERTS, "mixture_of_depths": 1, "hierarchical": 4}
    return info.fixed_selected or own.get(info.name, NUM_SELECTED)


def time_router(
    info: RouterInfo, rounds: int, tokens: int = TOKENS, whole_layer: bool = False, at_start: bool = False
) -> dict[str, Any]:
    """Return the ratio of one router's time to plain token choice of the same K (2 for the dense rule).

    ReMoE uses K experts per token on average, as its penalty makes it, or half of all `at_start`.
    """
    selected = selected_by(info)
    plain = "token_choice_raw" if selected == 1 else "token_choice"
    of_plain = NUM_SELECTED if selected == NUM_EXPERTS else selected
    turn = _layer_side if whole_layer else _side
    sides = {PLAIN: turn(plain, tokens, of_plain), OWN: turn(info.name, tokens, selected, at_start)}
    for side in sides.values():
        side.call()
    seconds = time_rounds(sides, rounds, time.perf_counter)
    found = paired(seconds[OWN], seconds[PLAIN])
    shown = {"ratio": found.median, "low": found.low, "high": found.high}
    name = f"{info.name} at its start" if at_start else info.name
    return {"router": name, "num_selected": selected, **shown, "seconds": seconds}


def _side(name: str, tokens: int, num_selected: int, at_start: bool = False) -> Turn:
    """Return a turn that does all that a layer does but its experts: tokens to plan and record, and back."""
    layer, x, ids, key = _layer(name, tokens, num_selected, 1, at_start)

    def run() -> None:
        flat, call = layer._call(x, None, key, ids)
        routed = layer.router.route(flat, call)
        sent, plan = layer._plan(routed, call)
        record = record_call(routed, plan, None, call.stats_size, False, sent)
        own = [value.sum() for value in record.sums.values() if value.requires_grad]
        # Every expert's mean score gets a gradient of its own, as from a balance loss.
        total = sent.weights.sum() + record.score_sums.square().sum() + sum(own)
        if total.requires_grad:
            total.backward()

    return Turn(run, lambda: None)


def _layer_side(name: str, tokens: int, num_selected: int, at_start: bool = False) -> Turn:
    """Return a turn that takes a whole layer of narrow experts forward and backward once."""
    layer, x, ids, key = _layer(name, tokens, num_selected, WIDTH, at_start)

    def run() -> None:
        y, stats = layer(x, key=key, token_ids=ids)
        own = [value.sum() for value in stats["router"].sums.values() if value.requires_grad]
        (y.sum() + stats["router"].score_sums.sum() + sum(own)).backward()

    return Turn(run, lambda: None)


def _layer(
    name: str, tokens: int, num_selected: int, expert_width: int, at_start: bool
) -> tuple[MoELayer, Tensor, Tensor, Tensor]:
    """Return a layer with this router, its tokens [T, D], their ids and the key of its noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        num_experts = 1 if name == "mixture_of_depths" else NUM_EXPERTS
        layer = MoELayer(WIDTH, num_experts, num_selected, expert_width, router=name)
        with torch.no_grad():
            layer.router.weight.normal_(std=WIDTH**-0.5)
        x = torch.randn(tokens, WIDTH)
        if name == "remoe" and not at_start:
            _settle(layer, x, num_selected)
        return layer, x.requires_grad_(), torch.randint(256, (tokens,)), torch.tensor(1)


@torch.no_grad()
def _settle(layer: MoELayer, x: Tensor, num_selected: int) -> None:
    """Lower all logits until K of a token's experts are above 0 on average: x's first number becomes 1."""
    x[:, 0] = 1.0
    logits = x @ layer.router.weight.t()
    layer.router.weight[:, 0] -= logits.flatten().kthvalue(logits.numel() - num_selected * x.shape[0]).values
