"""Any checkpoint as a model: a run of ours, or a folder of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gatewright.conversion import MODELS, load_decoder, load_t5, read_config
from gatewright.data import Tokenizer, load_tokenizer
from gatewright.errors import UserError
from gatewright.training.checks import resolve_device
from gatewright.training.load import load_run


@dataclass(frozen=True)
class Origin:
    """Where a loaded model comes from: its `folder`, whether that is a run of ours, `config` (config.json, or
    the run's settings), and the tokenizer, if one stands there as tokenizer.json.
    """

    folder: Path
    is_run: bool
    config: Mapping[str, Any]
    tokenizer: Tokenizer | None


def load(path: str | Path, *, dtype: str = "auto", device: str = "cpu", trust: bool = False) -> Any:
    """Return the model of a folder in evaluation mode: `model(tokens).logits` is [B, S, V], and
    `model.origin` is its Origin. A run of ours where the folder holds one, else a checkpoint of transformers
    (of T5 and Switch an EncoderDecoder).

    Args: `dtype` "auto" (what is stored; bf16 for FP8 and MXFP4), "fp32" or "bf16"; `trust` reads pickles.
    Raises: UserError for a folder that holds neither, and for a checkpoint that is not whole.
    """
    folder = Path(path)
    place = resolve_device(device)
    if (folder / "run.toml").exists():
        run = load_run(folder, device=device)
        if dtype != "auto":
            raise UserError(f"dtype {dtype!r} of a run of ours; allowed: auto, what it was trained in")
        model, config = run.model, dataclasses.asdict(run.settings)
        return _with_origin(model, Origin(folder, True, config, run.tokenizer))
    config = read_config(folder)
    if config.get("model_type") in MODELS:
        if dtype == "bf16":
            raise UserError("dtype 'bf16' of an encoder-decoder; allowed: auto, fp32")
        model = load_t5(folder)
    else:
        model = load_decoder(folder, dtype=dtype, trust=trust)
    file = folder / "tokenizer.json"
    tokenizer = load_tokenizer(file) if file.is_file() else None
    return _with_origin(model.to(place), Origin(folder, False, config, tokenizer))


def _with_origin(model: nn.Module, origin: Origin) -> nn.Module:
    # Beside parameters and modules: torch must not take it for either.
    model.__dict__["origin"] = origin
    return model
