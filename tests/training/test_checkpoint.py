"""A checkpoint is whole or refused by name; what was saved before outlives whatever happens to a save."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gatewright.training.checkpoint as module
from gatewright.errors import RunFailure, UserError
from gatewright.training.checkpoint import (
    Checkpoint,
    check_tensors,
    clear_leftovers,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
    write_atomic,
)
from tests.training.runs import digest


def made(step: int, value: float = 1.0) -> Checkpoint:
    weights = {"a": torch.full((3, 2), value), "b": torch.arange(5, dtype=torch.int64)}
    moments = {"a/exp_avg": torch.zeros(3, 2), "a/step": torch.tensor(float(step))}
    return Checkpoint(
        step, {"model": weights, "optimizer": moments}, {"step": step, "seconds": 0.5, "x": [1]}
    )


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path):
    values = torch.tensor([0.1, -0.0, torch.inf, torch.nan, 1e-45])
    given = Checkpoint(7, {"model": {"a": values, "b": values.bfloat16()}, "optimizer": {}}, {"step": 7})
    path = save_checkpoint(tmp_path, given, keep=1)
    assert path == tmp_path / "step-00000007"
    assert verify_checkpoint(path) is None
    back = load_checkpoint(path)
    assert digest(back) == digest(given)
    assert back.step == 7


def test_a_view_of_a_larger_tensor_is_saved_as_what_it_shows(tmp_path: Path):
    whole = torch.arange(12.0).view(3, 4)
    save_checkpoint(tmp_path, Checkpoint(1, {"model": {"t": whole.t()}}, {}), keep=1)
    held = newest_checkpoint(tmp_path)
    assert held is not None
    assert held.tensors["model"]["t"].tolist() == whole.t().tolist()


def test_the_newest_stay_and_steps_count_as_numbers(tmp_path: Path):
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        save_checkpoint(tmp_path, made(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-100000000", "step-100000001"]
    held = newest_checkpoint(tmp_path)
    assert held is not None
    assert held.step == 100_000_001


def test_a_copy_beside_is_no_checkpoint(tmp_path: Path):
    save_checkpoint(tmp_path, made(4), keep=1)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000009.bak")
    held = newest_checkpoint(tmp_path)
    assert held is not None
    assert held.step == 4


def test_no_checkpoint_is_none(tmp_path: Path):
    assert newest_checkpoint(tmp_path / "missing") is None
    assert newest_checkpoint(tmp_path) is None


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_every_flipped_bit_is_detected_and_named(tmp_path: Path):
    save_checkpoint(tmp_path, made(10), keep=2)
    newest = save_checkpoint(tmp_path, made(20), keep=2)
    draw = random.Random(0)
    for path in sorted(newest.iterdir()):
        original = path.read_bytes()
        for _ in range(60):
            flip(path, draw)
            fault = verify_checkpoint(newest)
            assert fault is not None, path
            assert "step-00000020" in fault
            if path.name != "manifest.json":
                assert path.name in fault
            path.write_bytes(original)
    assert verify_checkpoint(newest) is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "zeroed", "of another step"])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path: Path, name: str, damage: str):
    save_checkpoint(tmp_path, made(10), keep=2)
    newest = save_checkpoint(tmp_path, made(20, 2.0), keep=2)
    path = newest / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "of another step":
        # The weights of these two steps differ, as do their moments, states and manifests.
        shutil.copyfile(tmp_path / "step-00000010" / name, path)
    else:
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "zeroed": bytes(len(content))}[damage])
    warnings: list[str] = []
    held = newest_checkpoint(tmp_path, warnings.append)
    assert held is not None
    assert held.step == 10
    assert digest(held) == digest(made(10))
    assert len(warnings) == 1
    assert f"step-00000020/{name}" in warnings[0]
    with pytest.raises(RunFailure, match="use an earlier checkpoint"):
        load_checkpoint(newest)


def test_when_none_is_whole_nothing_begins_anew(tmp_path: Path):
    for step in (10, 20):
        (save_checkpoint(tmp_path, made(step), keep=2) / "state.json").write_text("{}")
    with pytest.raises(RunFailure, match=r"no checkpoint in .* is whole: .*step-00000020/state.json .*move"):
        newest_checkpoint(tmp_path)


def test_a_broken_newer_one_does_not_push_out_the_whole_ones(tmp_path: Path):
    save_checkpoint(tmp_path, made(10), keep=2)
    (save_checkpoint(tmp_path, made(20), keep=2) / "state.json").write_text("{}")
    for step in (12, 14):
        save_checkpoint(tmp_path, made(step), keep=1)
        held = newest_checkpoint(tmp_path)
        assert held is not None
        assert held.step == step


class Killed(BaseException):
    """What a kill looks like from inside: no handler runs."""


def test_the_step_being_replaced_is_never_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old, new = digest(made(5, 1.0)), digest(made(5, 2.0))
    outcomes = []
    for event in range(1, 40):
        folder = tmp_path / str(event)
        save_checkpoint(folder, made(5, 1.0), keep=1)
        seen = 0

        def counted(call: Callable[..., Any], event: int = event) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == event:
                    raise Killed
                return call(*args, **kwargs)

            return wrapper

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", counted(os.rename))
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            patch.setattr(module, "save_file", counted(module.save_file))
            try:
                save_checkpoint(folder, made(5, 2.0), keep=1)
            except Killed:
                pass
            else:
                break
        clear_leftovers(folder)
        assert [p.name for p in folder.iterdir()] == ["step-00000005"]
        held = newest_checkpoint(folder)
        assert held is not None
        outcomes.append(digest(held))
    # Two tensor files, five fsyncs, then the old one steps aside and the new one comes.
    assert outcomes[:9] == [old] * 9
    assert outcomes[9:] == [new] * 2


def test_a_failed_rename_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path, made(5, 1.0), keep=1)
    inner, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        inner(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(
        RunFailure, match=r"could not save .*No space left.*earlier checkpoints are unchanged"
    ):
        save_checkpoint(tmp_path, made(5, 2.0), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert digest(load_checkpoint(tmp_path / "step-00000005")) == digest(made(5, 1.0))


def test_files_and_folder_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    rename, fsync = os.rename, os.fsync

    def noted_rename(source: Path, target: Path) -> None:
        events.append(f"rename {Path(target).name}")
        rename(source, target)

    def noted_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append(f"fsync {'folder' if path.name.startswith('.step') else path.name}")
        fsync(handle)

    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    save_checkpoint(tmp_path / "c", made(3), keep=1)
    files = {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert set(events[:4]) == {f"fsync {name}" for name in files}
    assert events[4:] == ["fsync folder", "rename step-00000003", "fsync c"]


def test_write_atomic_leaves_the_old_content_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.toml"
    write_atomic(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailure, match=r"could not write .*run.toml: No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


def test_tensors_that_do_not_fit_are_refused():
    shapes = {"a": (3, 2)}
    moments = {"a/exp_avg": torch.zeros(3, 2), "a/exp_avg_sq": torch.zeros(3, 2), "a/step": torch.tensor(1.0)}
    good = {"model": {"a": torch.zeros(3, 2)}, "optimizer": moments}
    check_tensors(good, shapes, averaged=False)
    check_tensors({**good, "optimizer": {}}, shapes, averaged=False)
    check_tensors({**good, "average": good["model"]}, shapes, averaged=True)
    bad: list[tuple[str, dict[str, Any], bool]] = [
        ("average", good, True),
        ("model", {**good, "model": {"a": torch.zeros(2, 3)}}, False),
        ("model", {**good, "model": {"b": torch.zeros(3, 2)}}, False),
        ("optimizer", {"model": good["model"]}, False),
        ("optimizer", {**good, "optimizer": {k: v for k, v in moments.items() if k != "a/step"}}, False),
        ("optimizer", {**good, "optimizer": {**moments, "a/exp_avg": torch.zeros(2)}}, False),
        ("optimizer", {**good, "optimizer": {**moments, "b/step": torch.tensor(1.0)}}, False),
    ]
    for file, held, averaged in bad:
        with pytest.raises(UserError, match=f"the checkpoint's {file} holds other tensors"):
            check_tensors(held, shapes, averaged=averaged)


def test_the_state_is_json_and_the_manifest_names_every_file(tmp_path: Path):
    path = save_checkpoint(tmp_path, made(3), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert json.loads((path / "state.json").read_text()) == made(3).state
