"""What a conversion reads, by classic names: a folder of transformers in any layout, or a run's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.conversion.configurations import describe
from gatewright.conversion.decoders import fp8_blocks, shape_of
from gatewright.conversion.families import FAMILIES, Family
from gatewright.conversion.files import TensorFiles
from gatewright.conversion.folder import read_config
from gatewright.conversion.gguf_file import GGUFModel
from gatewright.conversion.pieces import Piece, pieces
from gatewright.conversion.released import classic_config, released_config
from gatewright.conversion.shards import Entry
from gatewright.conversion.stored import Stored
from gatewright.conversion.t5 import MODELS
from gatewright.errors import UserError

# What a tokenizer, a chat and a first generation need; weights and code are not among them.
BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "chat_template.json",
)


@dataclass(frozen=True)
class Source:
    """`entries` are what will be written and `get` reads one; `stored` is how many tensors they come from,
    and `left_out` what belongs to another part (of images). `model` has the weights of a run, of a folder
    none.
    """

    config: dict[str, Any]
    family: Family
    model: Decoder
    entries: tuple[Entry, ...]
    get: Callable[[Entry], Tensor]
    stored: int
    left_out: tuple[str, ...] = ()


def open_folder(folder: Path, dtype: torch.dtype | None, trust: bool) -> Source:
    """Return what a folder of transformers holds, with every tensor accounted for.

    Args: `dtype` None keeps what is stored, and makes bf16 of FP8 and MXFP4.
    Raises: UserError as `from_hf`, before a number is read.
    """
    config = read_config(folder)
    if config.get("model_type") in MODELS:
        raise UserError(
            f"a {config['model_type']} is not converted: it is stored as readers have it; allowed: decoders"
        )
    return _opened(config, TensorFiles(folder, trust), dtype)


def open_gguf(held: GGUFModel, dtype: torch.dtype | None) -> Source:
    """Return what a GGUF file holds: fp32, since its quantised weights are read as the numbers that they
    stand for.
    """
    return _opened(held.config, held.tensors, dtype)


def _opened(config: dict[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Source:
    stored = Stored(tensors, fp8_blocks(config))
    told = describe(config, stored.names)
    model = shape_of(told)
    wanted = [p for p in pieces(model, told.family) if not p.copy or stored.has(p.name)]
    entries = tuple(_entry(piece, stored.dtype(piece.name), dtype) for piece in wanted)
    stored.finish(model.tie_embeddings)
    classic = classic_config(config, told.family, told.kind, model)

    def get(entry: Entry) -> Tensor:
        return stored.take(entry.name, entry.shape).to(entry.dtype)

    return Source(
        _with_dtype(classic, entries), told.family, model, entries, get, len(stored.names), stored.left_out
    )


def open_run(paper: str, settings: Any, model: Decoder, dtype: torch.dtype | None) -> Source:
    """Return what a run's model holds, as the released architecture that it is.

    Raises: UserError where no released architecture can express it.
    """
    config = released_config(paper, settings, model)
    family = FAMILIES[config["model_type"]]
    named: Mapping[str, Piece] = {piece.name: piece for piece in pieces(model, family)}
    entries = tuple(_entry(piece, piece.views[0].dtype, dtype) for piece in named.values())

    def get(entry: Entry) -> Tensor:
        return named[entry.name].read().to(entry.dtype)

    return Source(_with_dtype(config, entries), family, model, entries, get, len(entries))


def _entry(piece: Piece, stored: torch.dtype, wanted: torch.dtype | None) -> Entry:
    # A selection bias is fp32 everywhere: steps of 0.001 would vanish in bf16.
    kept = wanted is None or not stored.is_floating_point or piece.name.endswith("e_score_correction_bias")
    return Entry(piece.name, stored if kept or wanted is None else wanted, piece.shape)


def _with_dtype(config: dict[str, Any], entries: tuple[Entry, ...]) -> dict[str, Any]:
    name = str(entries[0].dtype).removeprefix("torch.")
    return {**config, "dtype": name, "torch_dtype": name}
