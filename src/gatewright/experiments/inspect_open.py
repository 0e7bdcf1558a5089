"""What can be inspected: a run of ours or a checkpoint folder of transformers, opened and ready."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gatewright.conversion.folder import context_of, load_folder, read_config, vocabulary_of
from gatewright.conversion.recorder import RecordedModel
from gatewright.data import Tokenizer, load_tokenizer
from gatewright.data.tokenizer import beginning_of_text
from gatewright.errors import UserError
from gatewright.training.checks import resolve_device
from gatewright.training.load import load_run


@dataclass(frozen=True)
class InspectRun:
    """Where a model sends tokens: load, dead experts, specialisation, co-activation, coloured texts."""

    text: tuple[str, ...] = ()
    """text files; each is a domain, named after the file"""
    data: tuple[str, ...] = ()
    """files and folders as for training; their held-out documents are read"""
    out: str = ""
    """folder for the page, the result and the trace; none is runs/inspect-NAME"""
    tokens: int = 4096
    """tokens of each domain at most, in windows spread evenly over it"""
    context: int = 512
    """tokens read at once; the model's own limit if that is smaller"""
    batch_size: int = 4
    """windows at a time"""
    tokenizer: str = ""
    """path of a tokenizer.json; none is the model's own"""
    trace: bool = True
    """write trace.jsonl: a line per token, with its experts and weights in every layer"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """what a transformers model computes in; auto is what its checkpoint holds"""
    trust: bool = False
    """run the folder's own code and load pickled weights: do so only if you trust whoever wrote them"""
    averaged: bool = False
    """of a run of ours: the averaged weights instead of the live ones"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    device: str = "cpu"
    """cpu, cuda, or cuda:N"""

    def __post_init__(self) -> None:
        for name in ("tokens", "context", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}; allowed: 1 or more")
        if self.text and self.data:
            raise UserError("--text and --data; allowed: one of them; --data takes text files as well")


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be inspected. `model` takes (tokens, capture=True) and ids below `vocabulary`;
    `foreign`: it is of transformers; `start` ids stand before each window; `data` is what a run of ours was
    trained on.
    """

    name: str
    label: str
    model: nn.Module
    tokenizer: Tokenizer
    tokenizer_path: str
    context: int
    settings: Mapping[str, Any]
    vocabulary: int
    foreign: bool
    start: tuple[int, ...] = ()
    data: tuple[str, ...] = ()
    data_seed: int = 0


def open_model(folder: Path, options: InspectRun) -> Opened:
    """Return the model of a folder: a run of ours where it holds one, else a checkpoint of transformers."""
    if (folder / "run.toml").exists():
        return _open_run(folder, options)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; allowed: the --out folder of a run, or a folder that transformers' "
            "save_pretrained wrote; check the path"
        )
    if not (folder / "config.json").exists():
        below = sorted({path.parent for path in folder.glob("*/*/checkpoints")})
        hint = f"; runs below it: {', '.join(map(str, below[:4]))}" if below else ""
        raise UserError(
            f"{folder} holds neither run.toml nor config.json; allowed: the --out folder of a run, or a "
            f"folder that transformers' save_pretrained wrote{hint}"
        )
    return _open_checkpoint(folder, options)


def _open_run(folder: Path, options: InspectRun) -> Opened:
    loaded = load_run(folder, device=options.device, averaged=options.averaged)
    saved = "bytes" if loaded.tokenizer.name == "bytes" else str(folder / "tokenizer.json")
    return Opened(
        name=folder.resolve().name,
        label=f"{loaded.run.paper}, step {loaded.step}",
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        tokenizer_path=saved,
        context=min(options.context, loaded.settings.context),
        settings=dataclasses.asdict(loaded.settings),
        data=tuple(loaded.run.data),
        data_seed=loaded.run.data_seed,
        vocabulary=loaded.tokenizer.vocab_size,
        foreign=False,
    )


def _open_checkpoint(folder: Path, options: InspectRun) -> Opened:
    config = read_config(folder)
    path = Path(options.tokenizer) if options.tokenizer else folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing; allowed: a checkpoint with its tokenizer.json; give --tokenizer PATH"
        )
    tokenizer = load_tokenizer(path)
    start = beginning_of_text(path)
    place = str(resolve_device(options.device))
    model = load_folder(folder, dtype=options.dtype, device=place, trust=options.trust)
    if max(start, default=0) >= vocabulary_of(model):
        raise UserError(
            f"{path} begins texts with id {max(start)}, but the model has {vocabulary_of(model)} embeddings; "
            "allowed: the model's own tokenizer; give --tokenizer PATH"
        )
    return Opened(
        name=folder.resolve().name,
        label=f"{folder.resolve().name} ({type(model).__name__})",
        model=RecordedModel(model),
        tokenizer=tokenizer,
        tokenizer_path=str(path),
        context=context_of(model, options.context),
        settings=config,
        vocabulary=vocabulary_of(model),
        foreign=True,
        start=start,
    )
