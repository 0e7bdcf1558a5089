"""gatewright finetune: a run trained further on a task, stopped and resumed, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gatewright.cli import main
from gatewright.errors import UserError
from gatewright.experiments import finetune as module
from gatewright.experiments.finetune import FineTuneRun, finetune, tuned_settings
from gatewright.papers.switch import Settings
from gatewright.training import TrainRun, train
from gatewright.training.finetuner import FineTuner
from gatewright.training.load import load_run
from tests.training.runs import LOOP, final_digest, read_log, write_text
from tests.training.test_finetuner import hand_task

MODEL = Settings(width=16, num_heads=2, head_dim=8, num_experts=4, expert_width=16, ffn_width=16, context=32)
QUICK = {"steps": 6, "rows": 4, "evaluations": 2}


@pytest.fixture(autouse=True)
def hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the real tasks, and leave this process's memory as it is."""
    monkeypatch.setattr(module, "open_task", lambda name, **_: dataclasses.replace(hand_task(), name=name))
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with four experts."""
    root = tmp_path_factory.mktemp("trained")
    data = tuple(write_text(root / "text"))
    train(TrainRun(**LOOP, paper="switch", model=MODEL, data=data, tokens=256, out=str(root / "run")))
    return root / "run"


def test_the_command_writes_a_run_with_the_best_weights(trained: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "tuned"
    flags = ["--task", "brown", "--steps", "40", "--rows", "4", "--learning-rate", "1e-2"]
    more = ["--dropout", "0.1", "--expert-dropout", "0.4", "--out", str(out), "--json"]
    assert main(["finetune", str(trained), *flags, *more]) == 0
    printed = json.loads(capsys.readouterr().out)
    record = json.loads((out / "finetune.json").read_text())
    assert {**printed, "out": None, "stopped": None} == {**record, "out": None, "stopped": None}
    assert (record["task"], record["sizes"], record["run"]) == (
        "brown",
        {"train": 12, "dev": 12, "test": 12},
        str(trained),
    )
    # The labels' own accuracies, six texts each, are those of all.
    assert record["test"]["accuracy"] == pytest.approx(sum(record["by_label"].values()) / 2)
    loaded = load_run(out)
    assert (loaded.settings.dropout, loaded.settings.expert_dropout) == (0.1, 0.4)
    assert (loaded.settings.capacity_factor, loaded.run.data) == (None, load_run(trained).run.data)
    text = module.TaskRows(hand_task(), loaded.tokenizer, 32)
    again = FineTuner(dataclasses.replace(loaded.run, model=loaded.settings), text, loaded.model)
    assert again.score("test") == (record["test"]["accuracy"], pytest.approx(record["test"]["nats"]))
    assert main(["generate", str(out), "--prompt", "ab", "--max-new-tokens", "4"]) == 0


def test_a_stopped_one_resumes_to_the_bit(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    golden, out = tmp_path / "golden", tmp_path / "out"
    whole = finetune(trained, FineTuneRun(task="domain", out=str(golden), **QUICK))
    advance = FineTuner.advance

    def stopping(self: FineTuner) -> Any:
        record = advance(self)
        if self.step == 4:
            raise KeyboardInterrupt
        return record

    # A kill between two checkpoints costs the steps since the first.
    monkeypatch.setattr(FineTuner, "advance", stopping)
    small = {"task": "domain", "out": str(out), **QUICK}
    run = load_run(trained).run
    assert run.checkpoint_every == 7
    with pytest.raises(KeyboardInterrupt):
        finetune(trained, FineTuneRun(**small))
    monkeypatch.setattr(FineTuner, "advance", advance)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        finetune(trained, FineTuneRun(**small))
    again = finetune(trained, FineTuneRun(**small, resume=True))
    assert final_digest(out) == final_digest(golden)
    assert read_log(out) == read_log(golden)
    assert again.record is not None
    assert whole.record is not None
    assert again.record["test"] == whole.record["test"]
    with pytest.raises(UserError, match=r"learning_rate is 0.5 but the run in .* was begun with 0.002"):
        finetune(trained, FineTuneRun(**small, resume=True, learning_rate=0.5))


def test_what_cannot_be_fine_tuned_is_said(trained: Path, tmp_path: Path, capsys: Any):
    for argv, line in (
        ([], "RUN is missing; give the --out folder of a run"),
        ([tmp_path], "holds no run"),
        ([trained, "--out", trained], "is the run's own folder"),
        ([trained, "--steps", "0"], "steps 0; allowed: 1 or more"),
        ([trained, "--rows", "50", "--out", tmp_path / "no"], "50 rows a step; allowed: 1 to 12"),
        (
            [trained, "--dropout", "1.5", "--out", tmp_path / "no"],
            "dropout 1.5; allowed: 0 or more and below 1",
        ),
        ([trained, "--taks", "brown"], "did you mean '--task'"),
    ):
        assert main(["finetune", *map(str, argv)]) == 2
        assert line in capsys.readouterr().err


def test_a_paper_without_dropout_says_so(trained: Path):
    loaded = load_run(trained)
    from gatewright.papers.mixtral import Settings as Mixtral

    other = dataclasses.replace(
        loaded, settings=Mixtral(), run=dataclasses.replace(loaded.run, paper="mixtral")
    )
    with pytest.raises(UserError, match=r"dropout 0.1 for paper 'mixtral', which has none; allowed: a paper"):
        tuned_settings(other, FineTuneRun(dropout=0.1))
    assert tuned_settings(other, FineTuneRun()) == Mixtral()
    assert tuned_settings(loaded, FineTuneRun(capacity_factor=1.5)).capacity_factor == 1.5
