"""A sweep that ends early: stopped, killed, out of disk, or with every run diverged."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gatewright.errors import RunFailure, UserError
from gatewright.experiments.race_run import RaceRun
from gatewright.experiments.sweep import best_rate, sweep
from gatewright.papers.mixtral import Settings
from gatewright.training.trainer import Trainer
from tests.training.runs import LOOP, TINY


def tiny(data: list[str], **changes: Any) -> RaceRun:
    model = Settings(**TINY | {"num_layers": 1, "expert_width": 16})
    loop = LOOP | {"tokens": 8 * 64, "fraction": 0.5, "checkpoint_every": 3, "clip": 0.0} | changes
    return RaceRun(**loop, model=model, data=tuple(data))


def test_rates_that_all_break_the_model_are_recorded_and_none_is_best(data: list[str], tmp_path: Path):
    record = sweep(tiny(data), (1e29, 1e30), tmp_path / "sweep.json", ("dense",))
    assert [entry["valid_bpb"] for entry in record["entries"]] == [None, None]
    assert record["entries"][0]["failed"].startswith("step 2 of dense: loss ")
    with pytest.raises(UserError, match="no dense run of the sweep ended"):
        best_rate(record["entries"], "dense")


def test_a_stopped_sweep_goes_on_to_the_same_numbers(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    golden = sweep(tiny(data), (1e-3,), tmp_path / "golden/sweep.json", ("dense",))
    inner = Trainer.advance

    def stopped(self: Trainer) -> dict[str, Any]:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stopped)
        with pytest.raises(RunFailure, match=r"stopped at dense, rate 0\.001; the same command goes on"):
            sweep(tiny(data), (1e-3,), tmp_path / "run/sweep.json", ("dense",))
    steps: list[int] = []

    def noted(self: Trainer) -> dict[str, Any]:
        steps.append(self.step)
        return inner(self)

    monkeypatch.setattr(Trainer, "advance", noted)
    again = sweep(tiny(data), (1e-3,), tmp_path / "run/sweep.json", ("dense",))
    assert steps == [5, 6, 7]
    assert again["entries"][0]["valid_bpb"] == golden["entries"][0]["valid_bpb"]


def test_a_full_disk_ends_the_sweep_and_is_no_result(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise RunFailure("could not save: No space left on device")

    monkeypatch.setattr("gatewright.experiments.to_end.save_checkpoint", full)
    with pytest.raises(RunFailure, match="No space left"):
        sweep(tiny(data), (1e-3,), tmp_path / "sweep.json", ("dense",))
    assert not (tmp_path / "sweep.json").exists()
