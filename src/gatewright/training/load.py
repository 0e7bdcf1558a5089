"""Open a finished or stopped run again: its model with trained weights, its tokenizer and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gatewright.data import Tokenizer, load_tokenizer
from gatewright.errors import UserError
from gatewright.papers.registry import get_paper
from gatewright.papers.settings_table import settings_of
from gatewright.parts import quantise_experts
from gatewright.training.checkpoint import newest_checkpoint
from gatewright.training.checks import resolve_device
from gatewright.training.precision import set_router_dtype
from gatewright.training.run import TrainRun
from gatewright.training.settings_file import read_settings
from gatewright.training.state import load_weights


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what belongs to it. `step`: where the checkpoint was taken; `corpus`: the
    fingerprint of the text that it was trained on.
    """

    model: nn.Module
    tokenizer: Tokenizer
    run: TrainRun
    settings: Any
    step: int
    corpus: str


def load_run(
    out: str | Path, *, device: str = "cpu", averaged: bool = False, int8_experts: bool = False
) -> LoadedRun:
    """Return the newest whole checkpoint below `out`, a folder that `train` or one side of `race` wrote.

    `averaged` takes the averaged weights instead of the live ones; `int8_experts` reads the experts in int8.
    Raises: UserError if the folder holds no run, and for int8 without experts; RunFailure if no checkpoint
    is whole.
    """
    out = Path(out)
    tables = read_run_settings(out)
    if "into" in tables["run"]:
        raise UserError(f"{out} is a run of pairs; translate with it: gatewright translate {out} --text ...")
    paper = get_paper(tables["run"]["paper"])
    settings = settings_of(paper.Settings, tables["model"])
    run = settings_of(TrainRun, tables["run"])
    place = resolve_device(device)
    held = newest_checkpoint(out / "checkpoints")
    if held is None:
        raise UserError(f"{out} holds no checkpoint yet; wait for its first, or train on")
    model = paper.build(settings)
    weights = dict(held.tensors["model"])
    if averaged:
        if "average" not in held.tensors:
            raise UserError(f"{out} was trained without averaged weights (ema 0); use the live ones")
        weights |= held.tensors["average"]
    load_weights(model, weights)
    set_router_dtype(model, run.router_dtype)
    tokenizer = load_tokenizer(out / "tokenizer.json")
    if int8_experts:
        quantise_experts(model)
    text = str(held.state.get("corpus", ""))
    return LoadedRun(model.to(place).eval(), tokenizer, run, settings, held.step, text)


def read_run_settings(out: Path) -> dict[str, dict[str, Any]]:
    """Return run.toml's tables. Raises: UserError if `out` is no run, naming the runs below it if there
    are some.
    """
    if not (out / "run.toml").exists() or not (out / "checkpoints").exists():
        below = sorted({p.parent for p in out.glob("*/*/checkpoints")}) if out.is_dir() else []
        hint = f"; runs below it: {', '.join(map(str, below[:4]))}" if below else ""
        raise UserError(
            f"{out} holds no run (run.toml and checkpoints/); give the --out folder of `gatewright "
            f"train`{hint}"
        )
    return read_settings(out / "run.toml")
