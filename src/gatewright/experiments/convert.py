"""Convert a checkpoint to the classic layout of transformers: per-expert names, shards with an index."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gatewright.backbones import Decoder
from gatewright.conversion.beside import (
    bytes_tokenizer,
    copy_beside,
    write_beside,
    write_json,
    write_of_gguf,
)
from gatewright.conversion.configurations import describe
from gatewright.conversion.decoders import shape_of
from gatewright.conversion.folder import DTYPES
from gatewright.conversion.gguf_file import GGUFModel, read_gguf
from gatewright.conversion.shards import Entry, shard_names, split, write_index, write_shard
from gatewright.conversion.source import Source, open_folder, open_gguf, open_run
from gatewright.conversion.verify import TOLERANCE, check_bits, check_round_trip, logits_apart
from gatewright.conversion.widened import even_widths
from gatewright.data.pretrained import SMOLLM2_NAMES, smollm2_file
from gatewright.data.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, byte_alphabet
from gatewright.errors import RunFailure, UserError
from gatewright.training.load import LoadedRun, load_run
from gatewright.training.runlog import Progress
from gatewright.training.workplace import own_folder

PLAN = "plan.json"


@dataclass(frozen=True)
class ConvertRun:
    """What is written, and whether it is checked."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the tensors: auto keeps what is stored, and makes bf16 of FP8 and MXFP4"""
    verify: bool = False
    """read it again: every tensor bit for bit, through our weights and back, logits as transformers'"""
    shard_mb: int = 2000
    """megabytes of a file at most"""
    layers: int = 4
    """whose logits --verify compares, from the first on, in fp32"""
    averaged: bool = False
    """of a run of ours: the averaged weights instead of the live ones"""
    trust: bool = False
    """read pickled weights (*.bin): do so only if you trust whoever wrote them"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""

    def __post_init__(self) -> None:
        for name in ("shard_mb", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}; allowed: 1 or more")


@dataclass(frozen=True)
class Converted:
    """What was written. `logits`: how far from transformers', of the largest; None: not compared. `added`:
    hidden units of zeros that give all dense layers one width.
    """

    target: Path
    kind: str
    stored: int
    tensors: int
    size: int
    files: int
    left_out: tuple[str, ...] = ()
    verified: bool = False
    logits: float | None = None
    layers: int = 0
    added: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "target": str(self.target), "left_out": len(self.left_out)}

    def to_text(self) -> str:
        """Return what was written, and what was checked."""
        lines = [
            f"{self.target}: {self.kind}, {self.tensors:,} tensors from {self.stored:,} stored ones, "
            f"{self.size / 1e6:,.1f} MB in {self.files} file{'s' if self.files > 1 else ''}"
        ]
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)} tensors of images, as {self.left_out[0]}")
        if self.added:
            units = f"{self.added} hidden unit{'s' if self.added > 1 else ''}"
            lines.append(f"dense layers of one width: {units} of zeros added, which change no output")
        if self.verified:
            lines.append(
                "verified: all tensors accounted for, written bit for bit, and back from our weights"
            )
        if self.logits is not None:
            lines.append(f"logits of {self.layers} layers: {self.logits:.1e} from transformers', in fp32")
        elif self.verified:
            lines.append("logits not compared: transformers is not installed; pip install 'gatewright[hf]'")
        return "\n".join(lines)


def convert(source: str | Path, target: str | Path, options: ConvertRun | None = None) -> Converted:
    """Return what was written to `target`, a new folder: the checkpoint, run or GGUF file of `source` (or
    "smollm2") in the classic layout, with config.json, generation_config.json and the tokenizer's files.

    What is under way stands in TARGET.partial, shard by shard; the same call again goes on from there.
    Raises: UserError for a target that exists, for what `load` refuses, and for a run that no released
    architecture can express; RunFailure where --verify finds a difference: then nothing is left as `target`.
    """
    options, target = options or ConvertRun(), Path(target)
    source = smollm2_file() if source in SMOLLM2_NAMES else Path(source)
    if target.exists():
        raise UserError(f"{target} exists; allowed: a new folder; remove it, or give another")
    run: LoadedRun | None = None
    held: GGUFModel | None = None
    added = 0
    if (source / "run.toml").exists():
        run = load_run(source, averaged=options.averaged)
        if not isinstance(run.model, Decoder):
            raise UserError(f"a run of {run.run.paper} is no decoder; allowed: runs of one")
        settings, added = even_widths(run.settings, run.model)
        opened = open_run(run.run.paper, settings, run.model, DTYPES[options.dtype])
    elif source.suffix == ".gguf":
        held = read_gguf(source)
        opened = open_gguf(held, DTYPES[options.dtype])
    else:
        opened = open_folder(source, DTYPES[options.dtype], options.trust)
    shards = split(opened.entries, options.shard_mb * 1_000_000)
    partial = target.with_name(f"{target.name}.partial")
    with own_folder(partial), Progress("convert") as progress:
        _write(partial, source, opened, shards, progress)
        config = _beside(partial, source, opened, run or held)
        write_json(partial / "config.json", config)
        try:
            apart, layers = _verify(partial, opened, options, progress) if options.verify else (None, 0)
        except RunFailure:
            (partial / PLAN).unlink()  # so that the next try does not go on from what is wrong
            raise
        for name in (PLAN, ".lock"):
            (partial / name).unlink(missing_ok=True)
        partial.rename(target)
    size = sum(entry.size for entry in opened.entries)
    return Converted(
        target, config["model_type"], opened.stored, len(opened.entries), size, len(shards), opened.left_out,
        options.verify, apart, layers, added,
    )  # fmt: skip


def _write(
    partial: Path, source: Path, opened: Source, shards: Sequence[Sequence[Entry]], progress: Progress
) -> None:
    """Write every shard that does not stand there from an earlier try with the same plan."""
    (partial / "config.json").unlink(missing_ok=True)
    plan = {
        "source": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in _inputs(source)],
        "shards": [[[e.name, str(e.dtype), list(e.shape)] for e in shard] for shard in shards],
    }
    before: Any = None
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((partial / PLAN).read_text(encoding="utf-8"))
    if before != plan:
        for old in partial.glob("*.safetensors"):
            old.unlink()
        write_json(partial / PLAN, plan)
    names = shard_names(len(shards))
    for i, (name, shard) in enumerate(zip(names, shards, strict=True)):
        if not (partial / name).exists():
            write_shard(partial / name, shard, opened.get)
        progress.update((i + 1) / len(shards), f"file {i + 1} of {len(shards)}")
    write_index(partial, shards)


def _inputs(source: Path) -> list[Path]:
    """Return the files that the weights come from."""
    if source.is_file():
        return [source.resolve()]
    found = [p for end in ("*.safetensors", "pytorch_model*.bin") for p in source.resolve().rglob(end)]
    return sorted(found)


def _beside(
    partial: Path, source: Path, opened: Source, held: LoadedRun | GGUFModel | None
) -> dict[str, Any]:
    """Write what stands beside the weights, of a folder a copy, and return config.json."""
    config = dict(opened.config)
    if held is None:
        copy_beside(source, partial, config)
    elif isinstance(held, GGUFModel):
        write_of_gguf(partial, held, config)
    else:
        write_beside(partial, _tokenizer_json(held.tokenizer), held.tokenizer.eot, config)
    return config


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return a tokenizer as the `tokenizers` library reads it."""
    if isinstance(tokenizer, ByteTokenizer):
        return bytes_tokenizer(byte_alphabet(), tokenizer.eot, END_OF_TEXT)
    told: str = json.loads(tokenizer.to_json())["tokenizer"]
    return told


def _verify(
    partial: Path, opened: Source, options: ConvertRun, progress: Progress
) -> tuple[float | None, int]:
    """Return how far the logits are from transformers', and of how many layers. Raises: RunFailure."""
    progress.say("verify: bits")
    check_bits(partial, opened.entries, opened.get)
    progress.say("verify: through our weights and back")
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    names = {entry.name for entry in opened.entries}
    check_round_trip(partial, shape_of(describe(config, names)), opened.family)
    if find_spec("transformers") is None:
        return None, 0
    progress.say(f"verify: logits of the first {options.layers} layers")
    apart, layers = logits_apart(partial, options.layers)
    if not apart <= TOLERANCE:
        raise RunFailure(
            f"logits of {layers} layers are {apart:.1e} of the largest from transformers'; {partial} is left "
            "to be looked at"
        )
    return apart, layers
