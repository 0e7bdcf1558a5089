"""The parts of our layer's time: every operator in its own part, the whole near the time of a call."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from gatewright.kernels import native
from gatewright.measuring import BenchRun, layer
from gatewright.measuring.grid import Cell, Shape
from gatewright.measuring.profile import REST, part_of, profile_layer, profile_text
from tests.measuring.samples import MACHINE, TINY, row

NAMES = {
    "gatewright::experts_backward": "experts, backward",
    "GeneratedBackwardFor_gatewright_experts_forward_default": "experts, forward",
    "gatewright::experts_forward": "experts, forward",
    "gatewright::maps_forward": "router's map, forward",
    "gatewright::maps_backward": "router's map, backward",
    "gatewright::route_backward": "routing, backward",
    "GeneratedBackwardFor_gatewright_route_default": "routing, forward",
    "gatewright::plan_rows": "plan",
    "aten::add_": REST,
}


@pytest.mark.parametrize(("name", "part"), NAMES.items())
def test_every_operator_has_its_part(name: str, part: str):
    assert part_of(name) == part


@pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
def test_the_parts_of_a_layer_add_up_to_a_call():
    cell = Cell(Shape(2048, 64, 128, 8, 2), "fp32", "forward-backward", None)
    start = time.perf_counter()
    parts = profile_layer(cell, "native")
    taken = time.perf_counter() - start
    assert all(parts[part] > 0 for part in NAMES.values())
    assert parts["experts, backward"] > parts["router's map, forward"]
    # Nine calls, of which each is somewhere between the parts' sum and all the time there was.
    assert 0 < sum(parts.values()) < taken / 9 * 1.5


def test_the_largest_part_is_told_first_with_its_share():
    told = profile_text({"plan": 0.001, "experts, forward": 0.003, "routing, forward": 0.0})
    assert told == "experts, forward 3.00 ms (75%), plan 1.00 ms (25%)"


def test_a_profile_is_added_to_rows_that_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(layer, "measure_machine", lambda dtypes, rounds: MACHINE)
    monkeypatch.setattr(layer, "draw_pictures", lambda *_: [])
    monkeypatch.setattr(layer, "measure_cell", lambda cell, *_: row(kind=cell.kind))
    monkeypatch.setattr(layer, "profile_layer", lambda cell, backend: {"plan": 0.25})
    run = BenchRun(rows=(TINY.name,), dtypes=("fp32",), passes=("forward-backward",), out=str(tmp_path))
    assert "profile 48x16" not in layer.bench_layer(run, str).to_text()
    found = layer.bench_layer(replace(run, resume=True, profile=True), str)
    assert "profile 48x16x8x4x2 fp32 forward-backward: plan 250.00 ms (100%)" in found.to_text()
