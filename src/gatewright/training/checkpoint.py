"""Atomic checkpoints with a checksum manifest: a kill, a full disk or a flipped bit never costs what was
saved before.

Layout: OUT/checkpoints/step-00000250/ holds weights and optimizer as safetensors, everything else as JSON,
and manifest.json with the sha256 and size of each file. A checkpoint is written beside, flushed to disk, and
only then renamed into its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gatewright.errors import RunFailure, UserError

_SCHEMA = "gatewright.checkpoint.v1"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file stem ("model", "optimizer", ...) and name, and the JSON state beside them."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader finds the old or the new content, never part of it."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunFailure(
            f"could not write {path}: {error.strerror or error}; what was there is unchanged"
        ) from error


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write one checkpoint below `folder`, then remove all but the newest `keep`.

    Raises: RunFailure when it cannot be written (full disk); older checkpoints are untouched and nothing
    half-written stays.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    beside = folder / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        beside.mkdir(parents=True)
        for stem, tensors in checkpoint.tensors.items():
            save_file(
                {name: t.detach().contiguous() for name, t in tensors.items()}, beside / f"{stem}.safetensors"
            )
        (beside / "state.json").write_text(json.dumps(checkpoint.state), encoding="utf-8")
        files = {p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in sorted(beside.iterdir())}
        manifest = {"schema": _SCHEMA, "step": checkpoint.step, "files": files}
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in beside.iterdir():
            _sync(path)
        _sync(beside)
        _put(beside, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunFailure(f"could not save {final}: {error}; earlier checkpoints are unchanged") from error
    # Newer ones are those that a resume found broken: they must not push out the ones that are whole.
    for old in [p for p in _steps(folder) if _step_of(p) <= checkpoint.step][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _put(beside: Path, final: Path) -> None:
    """Give a finished checkpoint its name. One of the same name steps aside first, since folders cannot be
    exchanged in one step.
    """
    aside = None
    if final.exists():
        aside = beside.with_suffix(".old")
        os.rename(final, aside)
    try:
        os.rename(beside, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _steps(folder: Path) -> list[Path]:
    """Checkpoints by rising step; leftovers of a killed save carry another name and are no candidates."""
    held = [p for p in folder.glob("step-*") if p.is_dir() and _step_of(p) >= 0] if folder.is_dir() else []
    return sorted(held, key=_step_of)


def verify_checkpoint(path: Path) -> str | None:
    """Return None if every byte is as the manifest says, else one line naming the file that is not."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest.get("schema") != _SCHEMA:
            return f"{path}/manifest.json is of schema {manifest.get('schema')!r}, not {_SCHEMA}"
        if manifest["step"] != _step_of(path):
            return f"{path}/manifest.json is of step {manifest['step']}"
        for name, wanted in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != wanted["bytes"] or _sha256(file) != wanted["sha256"]:
                return f"{file} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}/manifest.json cannot be read ({type(error).__name__})"
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint whose checksums hold. Raises: RunFailure naming the file that does not."""
    fault = verify_checkpoint(path)
    if fault:
        raise RunFailure(f"{fault}; use an earlier checkpoint")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = {p.stem: load_file(p) for p in sorted(path.glob("*.safetensors"))}
    return Checkpoint(step=_step_of(path), tensors=tensors, state=state)


def newest_checkpoint(folder: Path, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None. `warn` gets a line for each newer one that is not.

    Raises: RunFailure if checkpoints exist but none is whole: starting anew would hide the loss.
    """
    faults = []
    for path in reversed(_steps(folder)):
        fault = verify_checkpoint(path)
        if fault is None:
            return load_checkpoint(path)
        faults.append(fault)
        if warn:
            warn(f"{fault}; going back to the checkpoint before it")
    if faults:
        raise RunFailure(
            f"no checkpoint in {folder} is whole: {faults[0]}; move the folder away to start anew"
        )
    return None


def clear_leftovers(folder: Path) -> None:
    """Undo what a killed save left behind: half-written folders go, and one that had stepped aside comes
    back.
    """
    if not folder.is_dir():
        return
    for file in folder.glob(".*.????????.tmp"):
        if file.is_file():
            file.unlink(missing_ok=True)
    for aside in folder.glob(".step-*.old"):
        final = folder / aside.name.split(".")[1]
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, final)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(
    held: Mapping[str, Mapping[str, Tensor]],
    shapes: Shapes,
    *,
    averaged: bool,
    buffers: Shapes | None = None,
) -> None:
    """Raise UserError unless weights, averages and AdamW's state are whole and fit parameters of `shapes`,
    and `buffers` stand beside the weights.

    A parameter that never got a gradient has no optimizer state; one with part of it would begin anew.
    """
    for file in ("model", "average") if averaged else ("model",):
        wanted = {**shapes, **(buffers or {})} if file == "model" else dict(shapes)
        if {n: tuple(t.shape) for n, t in held.get(file, {}).items()} != wanted:
            raise UserError(_other_tensors(file))
    moments = {name: tuple(t.shape) for name, t in held.get("optimizer", {}).items()}
    begun = {name.rpartition("/")[0] for name in moments}
    whole: dict[str, tuple[int, ...]] = {}
    for name in begun & shapes.keys():
        whole |= {f"{name}/exp_avg": shapes[name], f"{name}/exp_avg_sq": shapes[name], f"{name}/step": ()}
    if "optimizer" not in held or moments != whole:
        raise UserError(_other_tensors("optimizer"))


def _other_tensors(file: str) -> str:
    return (
        f"the checkpoint's {file} holds other tensors than this run's; allowed: the same settings; give "
        "another --out"
    )


def optimizer_tensors(optimizer: Any, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return AdamW's state as flat tensors, "NAME/exp_avg", "NAME/exp_avg_sq", "NAME/step"."""
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(optimizer: Any, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, on each parameter's device (step counters stay as
    saved).
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    for parameter, name in names.items():
        if name in by_name:
            optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in by_name[name].items()
            }
