"""--resume: the same settings go on to the same end; others, and a second process, are refused by name."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gatewright.errors import RunFailure, UserError
from gatewright.training import loop, train
from gatewright.training.checkpoint import load_checkpoint, newest_checkpoint
from gatewright.training.settings_file import check_same_settings, settings_tables, write_settings
from tests.training.runs import final_digest, read_log, tiny_run, train_argv

Server = Callable[..., dict[str, Any]]


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and takes longer than these runs."""
    monkeypatch.setattr(loop, "write_report", lambda *_: None)


@pytest.mark.usefixtures("without_report")
def test_a_finished_run_resumed_only_rewrites_its_result(data: list[str], tmp_path: Path):
    run = tiny_run(data, tmp_path / "run", steps=8)
    train(run)
    final = newest_checkpoint(tmp_path / "run/checkpoints")
    assert final is not None
    folder = tmp_path / "run/checkpoints/step-00000008"
    inode, log = folder.stat().st_ino, read_log(tmp_path / "run")
    (tmp_path / "run/train.json").unlink()
    result = train(dataclasses.replace(run, resume=True))
    assert not result.stopped
    assert (tmp_path / "run/train.json").exists()
    assert folder.stat().st_ino == inode
    assert read_log(tmp_path / "run") == log
    assert [point["step"] for point in result.record["runs"][0]["sides"][0]["curve"]] == [2, 4, 6, 8]


@pytest.mark.usefixtures("without_report")
def test_a_used_folder_is_not_overwritten(data: list[str], tmp_path: Path):
    run = tiny_run(data, tmp_path / "run", steps=4)
    train(run)
    before = final_digest(tmp_path / "run")
    for left in ("run.toml", "train.json", "checkpoints"):
        with pytest.raises(
            UserError, match="already holds a run; continue it with --resume, or give another"
        ):
            train(run)
        path = tmp_path / "run" / left
        if left == "checkpoints":
            assert final_digest(tmp_path / "run") == before
            shutil.rmtree(path)
        else:
            path.unlink()
    train(run)


@pytest.mark.usefixtures("without_report")
def test_a_run_that_came_in_between_is_not_overwritten(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, inner = tiny_run(data, tmp_path / "run", steps=4), loop.prepare

    def meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(loop, "prepare", inner)
        train(run)
        return inner(*args)

    monkeypatch.setattr(loop, "prepare", meanwhile)
    with pytest.raises(UserError, match="already holds a run"):
        train(run)
    assert [line["step"] for line in read_log(tmp_path / "run") if line["kind"] == "step"] == [1, 2, 3, 4]


@pytest.mark.usefixtures("without_report")
def test_checkpoints_without_run_toml_are_not_begun_over(data: list[str], tmp_path: Path):
    run = tiny_run(data, tmp_path / "run", steps=4)
    train(run)
    (tmp_path / "run/run.toml").unlink()
    with pytest.raises(UserError, match=r"run\.toml is not there"):
        train(dataclasses.replace(run, resume=True))


@pytest.mark.usefixtures("without_report")
def test_a_damaged_newest_checkpoint_is_named_and_the_run_ends_golden(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tiny_run(data, tmp_path / "run", steps=12, checkpoint_every=5, keep_checkpoints=3)
    train(run)
    golden, log = final_digest(tmp_path / "run"), read_log(tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    weights = folder / "step-00000012/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    capsys.readouterr()
    train(dataclasses.replace(run, resume=True))
    said = capsys.readouterr().err
    assert "step-00000012/model.safetensors does not match its checksum; going back" in said
    assert "mixtral: continuing from step 10" in said
    assert final_digest(tmp_path / "run") == golden
    assert read_log(tmp_path / "run") == log
    for held in folder.iterdir():
        (held / "state.json").write_text("{}")
    with pytest.raises(RunFailure, match=r"no checkpoint in .* is whole"):
        train(dataclasses.replace(run, resume=True))


# What may differ between a run and its continuation; every number depends on all other settings.
FREE = {"resume": True, "threads": 1, "out": "elsewhere", "checkpoint_every": 3, "keep_checkpoints": 9}
FREE |= {"recompute": "blocks"}


def test_every_setting_but_the_free_ones_is_held(data: list[str], tmp_path: Path):
    run = tiny_run(data, tmp_path, minutes=5.0, until_loss=1.0)
    path = tmp_path / "run.toml"
    write_settings(path, run, run.model)
    check_same_settings(path, dataclasses.replace(run, **FREE), run.model)
    other = {"schedule": "cosine", "precision": "bf16", "router_dtype": "bf16", "on_nonfinite": "skip"}
    other |= {"paper": "olmoe", "tokenizer": "bpe:300", "data": ("/elsewhere",), "moe_layers": "last:1"}
    other |= {"tie_embeddings": True, "ema": 0.5, "beta1": 0.8, "beta2": 0.9, "decay_share": 0.3}
    other |= {"data_fraction": 0.5, "final_rate": 0.5, "balance_scope": "sequence", "idle_experts": "skip"}
    held = 0
    for name, value in settings_tables(run, run.model)["run"].items():
        if name in {*FREE, "device"}:
            continue
        new = other.get(name, value + 1 if isinstance(value, (int, float)) else None)
        with pytest.raises(UserError, match=rf"^{name} is .*begun with .*; resume with the same settings"):
            check_same_settings(path, dataclasses.replace(run, **{name: new}), run.model)
        held += 1
    for name, value in settings_tables(run, run.model)["model"].items():
        new = other.get(name, value + 1 if isinstance(value, (int, float)) else None)
        with pytest.raises(UserError, match=rf"^{name} is "):
            check_same_settings(path, run, dataclasses.replace(run.model, **{name: new}))
        held += 1
    assert held > 35
    with pytest.raises(UserError, match=r"^minutes is None but the run in .* was begun with 5.0"):
        check_same_settings(path, dataclasses.replace(run, minutes=None), run.model)


def test_a_file_from_before_a_setting_stands_for_its_default(data: list[str], tmp_path: Path):
    run = tiny_run(data, tmp_path)
    path = tmp_path / "run.toml"
    write_settings(path, run, run.model)
    kept = [line for line in path.read_text().splitlines() if not line.startswith("idle_experts")]
    path.write_text("\n".join(kept))
    check_same_settings(path, run, run.model)
    with pytest.raises(UserError, match=r"^idle_experts is skip but .* begun with adamw"):
        check_same_settings(path, dataclasses.replace(run, idle_experts="skip"), run.model)


def test_the_log_keeps_no_line_twice_and_loses_none(data: list[str], tmp_path: Path, server: Server):
    out = tmp_path / "run"
    server(train_argv(data, out, 16), signal_at=["SIGKILL", 13])
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    assert len([line for line in lines if '"kind": "step"' in line]) == 12
    # A line cut off by the kill, and one that is no record.
    (out / "log.jsonl").write_text("".join([*lines, '{"kind": "step", "step": 13, "to']))
    assert server(train_argv(data, out, 16, "--resume"))["code"] == 0
    steps = [line["step"] for line in read_log(out) if line["kind"] == "step"]
    assert steps == list(range(1, 17))


def test_a_second_process_on_the_same_folder_is_refused(data: list[str], tmp_path: Path, server: Server):
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reply = server(train_argv(data, out, 4, "--resume"))
        assert reply["code"] == 2
        assert reply["stderr"].splitlines()[-1] == (
            f"gatewright: error: another run is writing to {out}; wait for it, or give another --out"
        )
        assert [p.name for p in out.iterdir()] == [".lock"]
    assert server(train_argv(data, out, 4, "--resume"))["code"] == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_saves_and_exits_and_resumes_to_the_same_end(
    name: str, data: list[str], tmp_path: Path, server: Server
):
    for out, request in ((tmp_path / "golden", {}), (tmp_path / "run", {"signal_at": [name, 6]})):
        reply = server(train_argv(data, out, 10), **request)
    assert reply["code"] == 130
    # The step in which it came is finished and saved, between two checkpoints of every 7 steps.
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]
    assert load_checkpoint(tmp_path / "run/checkpoints/step-00000006").state["step"] == 6
    assert reply["stdout"].startswith("stopped, `--resume` continues: ")
    assert "Traceback" not in reply["stderr"]
    resumed = server(train_argv(data, tmp_path / "run", 10, "--resume", "--json"))
    assert resumed["code"] == 0
    assert json.loads(resumed["stdout"])["stopped"] is False
    assert final_digest(tmp_path / "run") == final_digest(tmp_path / "golden")
    assert read_log(tmp_path / "run") == read_log(tmp_path / "golden")


def test_a_stop_before_the_first_evaluation_adds_none_to_the_run(
    data: list[str], tmp_path: Path, server: Server
):
    few = ["--evaluations", "1"]
    for out, request in ((tmp_path / "golden", {}), (tmp_path / "run", {"signal_at": ["SIGINT", 2]})):
        server(train_argv(data, out, 6, *few), **request)
    assert server(train_argv(data, tmp_path / "run", 6, *few, "--resume"))["code"] == 0
    assert final_digest(tmp_path / "run") == final_digest(tmp_path / "golden")
