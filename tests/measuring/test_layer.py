"""`bench_layer` from settings to file: schema, resuming, refusing, sides that are missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gatewright.errors import RunFailure, UserError
from gatewright.measuring import BenchRun, bench_layer, held, layer, pictures, rivals
from gatewright.measuring.sides import DENSE, FEW, OURS, TRANSFORMERS
from tests.measuring.samples import MACHINE, TINY, row

SMALL = TINY._replace(num_experts=2)


@pytest.fixture(autouse=True)
def a_quick_machine(monkeypatch):
    monkeypatch.setattr(layer, "measure_machine", lambda dtypes, rounds: MACHINE)
    # Tiny rows on a busy machine: what is refused has its own test.
    monkeypatch.setattr("gatewright.measuring.record.LARGEST_SPREAD", 1e9)
    monkeypatch.setattr(layer, "SLOW", 1e9)
    monkeypatch.setattr(layer, "draw_pictures", lambda rows, out: [])


@pytest.fixture
def run(tmp_path: Path) -> BenchRun:
    return BenchRun(rows=(SMALL.name, TINY.name), rounds=11, out=str(tmp_path / "out"))


def read(run: BenchRun) -> dict[str, Any]:
    return json.loads((Path(run.out) / "layer.json").read_text())


def test_every_side_of_every_row_is_timed_and_written(run: BenchRun, monkeypatch):
    monkeypatch.setattr(layer, "draw_pictures", pictures.draw_pictures)
    lines: list[str] = []
    run = replace(run, passes=("forward-backward",))
    result = bench_layer(run, lines.append)
    record = read(run)
    assert record["schema"] == "gatewright.bench.layer.v2"
    assert {"processor", "threads", "torch", "commit"} <= set(record["environment"])
    assert set(record["settings"]) == {
        *("rounds", "warm_ups", "allocator", "gradients", "backend", "transformers", "code")
    }
    assert record["machine"]["copy_bytes"] == {"median": 10, "low": 9, "high": 11}
    assert len(record["rows"]) == len(lines) == 2 * 2
    assert lines[0].startswith("1/4 48x16x8x2x2 fp32 forward-backward: ")
    for entry in record["rows"]:
        few = [FEW] if entry["name"] == TINY.name else []
        assert set(entry["seconds"]) == {OURS, *TRANSFORMERS, *DENSE, *few}
        assert {len(times) for times in entry["seconds"].values()} == {11}
        ratio = entry["ratios"]["dense"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert set(entry["spread"]) == set(entry["seconds"])
        assert entry["left_out"] == {}
    assert [entry["dtype"] for entry in record["rows"]] == ["fp32", "bf16"] * 2
    assert len(record["geometric_means"]) == 2
    assert len(record["expert_costs"]) == 2
    assert {goal["held"] for goal in record["goals"]} <= {True, False}
    assert all(Path(file).is_file() for file in result.files)
    assert sum(file.endswith(".png") for file in result.files) == 2
    assert result.to_dict()["rows"] == result.record["rows"]
    result.check()
    text = result.to_text()
    assert "geometric means" in text
    assert text.count("     48") == 4
    assert all(goal["shown"] in text for goal in record["goals"])


def counted(monkeypatch) -> list[str]:
    """Put a list in place of measuring: what is measured is named there."""
    measured: list[str] = []

    def fake(cell, run, machine):
        measured.append(f"{cell.shape.num_experts} {cell.dtype}")
        few = 1.0 if cell.few else None
        return row(cell.shape, cell.dtype, cell.kind, few=few) | {
            "fewest_experts": cell.few.num_experts if cell.few else None
        }

    monkeypatch.setattr(layer, "measure_cell", fake)
    return measured


def test_resume_keeps_rows_of_the_same_settings_only(run: BenchRun, monkeypatch):
    measured = counted(monkeypatch)
    run = replace(run, passes=("forward",))
    bench_layer(replace(run, dtypes=("fp32",)), str)
    assert measured == ["2 fp32", "4 fp32"]
    measured.clear()
    again = bench_layer(replace(run, resume=True), str)
    assert measured == ["2 bf16", "4 bf16"]
    assert len(again.record["rows"]) == 4
    for other in (
        {"rounds": 12},
        {"allocator": "default"},
        {"keep_gradients": True},
        {"backend": "reference"},
    ):
        measured.clear()
        bench_layer(replace(run, resume=True, out=run.out + "2"), str)
        measured.clear()
        bench_layer(replace(run, resume=True, out=run.out + "2", **other), str)
        assert len(measured) == 4, other
    measured.clear()
    bench_layer(run, str)
    assert len(measured) == 4


def test_resume_measures_anew_with_other_code_or_another_machine(run: BenchRun, monkeypatch):
    measured = counted(monkeypatch)
    run = replace(run, passes=("forward",), dtypes=("fp32",), resume=True)
    bench_layer(run, str)
    place = held.environment("cpu")
    for place_now, code, expected in (
        (place | {"commit": "another"}, "same", 2),
        (place | {"commit": "a third"}, "same", 0),
        (place, "changed", 2),
        (place | {"processor": "faster"}, "changed", 2),
    ):
        measured.clear()
        monkeypatch.setattr(held, "environment", lambda device, now=place_now: now)
        monkeypatch.setattr(held, "code_version", lambda package, now=code: now)
        bench_layer(run, str)
        assert len(measured) == expected, (place_now, code)


def test_resume_on_other_rows_loses_none_and_refused_ones_are_measured_again(run: BenchRun, monkeypatch):
    measured = counted(monkeypatch)
    run = replace(run, passes=("forward",), dtypes=("fp32",))
    bench_layer(run, str)
    one = replace(run, rows=(TINY._replace(tokens=32).name,), resume=True)
    assert len(bench_layer(one, str).record["rows"]) == 3
    path = Path(run.out) / "layer.json"
    record = read(run)
    record["rows"][1]["refused"] = "the machine is busy"
    path.write_text(json.dumps(record))
    measured.clear()
    bench_layer(replace(run, resume=True), str)
    assert len(measured) == 1
    path.write_text("[]")
    with pytest.raises(RunFailure, match="leave --resume out"):
        bench_layer(replace(run, resume=True), str)


def test_a_noisy_row_is_refused_and_the_others_are_kept(run: BenchRun, monkeypatch):
    run = replace(run, passes=("forward",), dtypes=("fp32",))
    monkeypatch.setattr("gatewright.measuring.record.LARGEST_SPREAD", 0.25)
    noise = iter([0.5, 0.0])
    monkeypatch.setattr(layer, "measure_cell", lambda cell, run, machine: row(cell.shape, noise=next(noise)))
    lines: list[str] = []
    result = bench_layer(run, lines.append)
    with pytest.raises(RunFailure, match=r"1 of 2 rows refused.*48x16x8x2x2.*--resume"):
        result.check()
    assert "refused: the dense side alone spread by 50 %" in lines[0]
    first, second = read(run)["rows"]
    assert first["refused"]
    assert first["seconds"]
    assert second["refused"] is None
    assert read(run)["geometric_means"][0]["rows"] == 1
    shown = [line for line in result.to_text().splitlines() if line.startswith("     48")]
    assert "2.00" not in shown[0]
    assert "2.00" in shown[1]


def test_without_transformers_its_sides_are_left_out_and_it_is_said(run: BenchRun, monkeypatch):
    for module in (layer, held):
        monkeypatch.setattr(module, "transformers_version", lambda: None)
    lines: list[str] = []
    run = replace(run, rows=(TINY.name,), passes=("forward",), dtypes=("fp32",))
    result = bench_layer(run, lines.append)
    (entry,) = result.record["rows"]
    assert set(entry["seconds"]) == {OURS, *DENSE}
    assert set(entry["left_out"].values()) == {"transformers is not installed"}
    assert "transformers is not installed" in lines[0]
    assert "transformers not installed" in result.to_text()


def test_the_version_of_transformers_is_found_or_absent(monkeypatch):
    assert rivals.transformers_version() == "5.23.0"
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    assert rivals.transformers_version() is None


def test_the_code_version_changes_with_a_measured_file_only(tmp_path: Path):
    for name in ("kernels/a.py", "kernels/native/b.cpp", "parts/c.py", "training/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    seen = [held.code_version(tmp_path)]
    (tmp_path / "training/d.py").write_text("2")
    assert held.code_version(tmp_path) == seen[0]
    for name in ("kernels/a.py", "kernels/native/b.cpp"):
        (tmp_path / name).write_text("2")
        seen.append(held.code_version(tmp_path))
    assert len(set(seen)) == 3


def test_a_folder_in_use_is_refused(run: BenchRun):
    Path(run.out).write_text("")
    with pytest.raises(UserError, match="is a file"):
        bench_layer(run, str)
