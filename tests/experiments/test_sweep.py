"""Sweeps: the best rate of each side, whole runs, and entries that are kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gatewright.errors import Diverged, UserError
from gatewright.experiments import RaceRun
from gatewright.experiments import sweep as module
from gatewright.experiments.sweep import best_rate, sweep
from gatewright.papers.mixtral import Settings
from tests.training.runs import LOOP, TINY, write_text


def entry(kind: str, rate: float, bits: float | None) -> dict[str, Any]:
    return {"kind": kind, "learning_rate": rate, "valid_bpb": bits}


def test_the_best_rate_is_that_of_the_lowest_loss_of_its_own_kind() -> None:
    entries = [entry("dense", 1.0, 3.0), entry("dense", 2.0, 2.0), entry("dense", 4.0, 2.5)]
    entries += [entry("sparse", 1.0, 1.0), entry("sparse", 2.0, 1.5), entry("sparse", 4.0, 0.5)]
    assert best_rate(entries, "dense") == 2.0


def test_a_diverged_run_is_not_the_best_but_ends_the_list() -> None:
    entries = [entry("dense", 1.0, 3.0), entry("dense", 2.0, 2.0), entry("dense", 4.0, None)]
    assert best_rate(entries, "dense") == 2.0


@pytest.mark.parametrize("best", [0, 3])
def test_a_best_rate_at_the_end_of_its_list_is_refused(best: int) -> None:
    entries = [entry("sparse", 10.0**-n, 1.0 if n == best else 2.0) for n in range(4)]
    with pytest.raises(UserError, match="end of its list"):
        best_rate(entries, "sparse")


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RaceRun:
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    data = tuple(write_text(tmp_path / "text"))
    return RaceRun(model=Settings(**TINY), data=data, tokens=640, **LOOP)


def test_a_sweep_trains_each_side_once_per_rate_and_keeps_what_it_has(
    race: RaceRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep" / "sweep.json"
    record = sweep(race, (1e-3, 1e-2), path)
    did = {(e["name"], e["learning_rate"], e["tokens"]) for e in record["entries"]}
    assert did == {(n, r, t) for r in (1e-3, 1e-2) for n, t in (("dense", 640), ("sparse", 384))}
    assert json.loads(path.read_text())["entries"] == record["entries"]

    def fails(*_: Any) -> dict[str, Any]:
        raise AssertionError("trained again what was in the file")

    monkeypatch.setattr(module, "_run_entry", fails)
    assert sweep(race, (1e-3, 1e-2), path)["entries"] == record["entries"]


def test_a_sweep_of_other_settings_or_text_is_not_continued(race: RaceRun, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    sweep(race, (1e-3,), path, kinds=("dense",))
    with pytest.raises(UserError, match="other settings"):
        sweep(dataclasses.replace(race, tokens=1280), (1e-3,), path)
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "fingerprint": "of other text"}))
    with pytest.raises(UserError, match="other text"):
        sweep(race, (1e-3,), path)


def test_a_diverged_rate_is_recorded_and_the_sweep_goes_on(
    race: RaceRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.Trainer.advance

    def advance(self: Any) -> dict[str, Any]:
        if self.run.learning_rate == 1.0:
            raise Diverged("loss nan")
        return whole(self)

    monkeypatch.setattr(module.Trainer, "advance", advance)
    record = sweep(race, (1.0, 1e-3), tmp_path / "sweep.json", kinds=("sparse",))
    assert [e["valid_bpb"] is None for e in record["entries"]] == [True, False]
    assert record["entries"][0]["failed"] == "loss nan"
