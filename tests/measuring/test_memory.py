"""Peak memory is that of live tensors, seen from outside."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from gatewright.errors import UserError
from gatewright.measuring import BenchRun, layer, memory
from gatewright.measuring.grid import Cell, Shape
from gatewright.measuring.sides import LINEAR, OURS
from tests.measuring.samples import MACHINE, TINY, row

MIB = 1 << 20
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs is Linux's")


# In a fresh process: this one's allocator may keep what is freed.
GROWTH = """
import torch
from gatewright.measuring.memory import growth, return_big_blocks
from gatewright.measuring.rounds import Turn

return_big_blocks()
kept = []

def call():
    first = torch.ones(16 << 20)  # 64 MiB, given up before the end
    del first
    kept.append(torch.ones(8 << 20))

print(*growth(Turn(call, kept.clear), 3))
"""


@needs_linux
def test_a_peak_that_is_gone_by_the_end_of_the_call_is_seen():
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, timeout=60
    )
    grown = [int(word) for word in done.stdout.split()]
    assert len(grown) == 3
    assert all(63 * MIB < one < 70 * MIB for one in grown), grown


@needs_linux
def test_a_side_is_measured_in_a_process_of_its_own():
    shape = Shape(tokens=4096, width=64, expert_width=256, num_experts=2, num_selected=2)
    found = memory.peak_memory(Cell(shape, "fp32", "forward-backward", None), LINEAR, None, 1)
    # 4096 x 513 x 2 numbers before the activation have to be held, 16 MiB; a few times that at the peak.
    assert found is not None
    assert 24 * MIB < found < 90 * MIB


def test_a_process_that_dies_is_no_figure(monkeypatch):
    class Dead:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, *_):
            raise memory.BrokenProcessPool("killed")

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Dead)
    cell = Cell(Shape(8, 8, 8, 2, 1), "fp32", "forward-backward", None)
    assert memory.peak_memory(cell, OURS, None, 1) is None


def test_memory_is_asked_of_each_side_and_only_with_the_backward_pass(monkeypatch, tmp_path):
    asked: list[str] = []
    monkeypatch.setattr(layer, "measure_machine", lambda dtypes, rounds: None)
    monkeypatch.setattr(layer, "_record", lambda *_: {"rows": []})
    monkeypatch.setattr(layer, "draw_pictures", lambda *_: [])
    monkeypatch.setattr(layer, "check_memory_can_be_measured", lambda: None)
    monkeypatch.setattr(layer, "measure_cell", lambda *_: {"memory": None, "refused": "busy"})
    monkeypatch.setattr(layer, "peak_memory", lambda cell, name, *_: asked.append(name) or 1)
    run = BenchRun(rows=("16384x128x256x64x2",), dtypes=("fp32",), memory=True, out=str(tmp_path))
    layer.bench_layer(run, str)
    # batched_mm would copy 12 GiB of weights.
    assert asked == [OURS, LINEAR, "transformers_eager", "transformers_grouped_mm"]


def test_a_system_that_cannot_tell_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_RESET", tmp_path / "none")
    with pytest.raises(UserError, match="--memory on this system; allowed: Linux"):
        layer.bench_layer(BenchRun(quick=True, memory=True, out=str(tmp_path / "out")), str)
    assert not (tmp_path / "out").exists()


def test_resuming_adds_memory_to_rows_that_are_kept(monkeypatch, tmp_path):
    timed: list[str] = []
    monkeypatch.setattr(layer, "measure_machine", lambda dtypes, rounds: MACHINE)
    monkeypatch.setattr(layer, "check_memory_can_be_measured", lambda: None)
    monkeypatch.setattr(layer, "draw_pictures", lambda *_: [])
    monkeypatch.setattr(
        layer, "measure_cell", lambda cell, *_: timed.append(cell.kind) or row(kind=cell.kind)
    )
    monkeypatch.setattr(layer, "peak_memory", lambda cell, name, *_: {OURS: 7}.get(name, 8))
    run = BenchRun(rows=(TINY.name,), dtypes=("fp32",), out=str(tmp_path))
    assert {entry["memory"] for entry in layer.bench_layer(run, str).record["rows"]} == {None}
    timed.clear()
    forward, both = layer.bench_layer(replace(run, resume=True, memory=True), str).record["rows"]
    assert (timed, forward["memory"]) == ([], None)
    assert both["memory"][OURS] == 7
