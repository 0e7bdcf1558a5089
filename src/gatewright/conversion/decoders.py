"""A released decoder as one of ours: a configuration and tensors in, a model with every weight filled out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.backbones import Attention, Decoder, RMSNorm, RopeScaling, RotaryPositions, on_no_memory
from gatewright.conversion.configurations import Described, describe
from gatewright.conversion.families import family_of
from gatewright.conversion.files import TensorFiles
from gatewright.conversion.folder import DTYPES, read_config
from gatewright.conversion.pieces import Piece, pieces
from gatewright.conversion.stored import Stored
from gatewright.errors import UserError
from gatewright.papers import get_paper

_READ_AS = (torch.float32, torch.bfloat16, torch.float16)


def from_hf(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> Decoder:
    """Return the decoder of a configuration (config.json) and its tensors, in evaluation mode.

    Args: `tensors` by their released names, in any of the layouts of `Stored`; `dtype` None is fp32.
    Raises: UserError for a family or a word that cannot be read, for a tensor that is missing, has another
    shape, or belongs nowhere: one line that names it.
    """
    stored = Stored(tensors, fp8_blocks(config))
    told = describe(config, stored.names)
    model = shape_of(told)
    if dtype is not None:
        model.to(dtype)
    model.to_empty(device="cpu")
    if model.tie_embeddings:
        model.head.weight = model.embedding.weight
    fill(pieces(model, told.family), stored, tied=model.tie_embeddings)
    for name, value in model.named_buffers():
        if name.endswith("rule.bias.updates"):
            value.zero_()
    return model.eval()


def fp8_blocks(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the size of an FP8 scale's block. Raises: UserError for weights quantised in another way."""
    told = config.get("quantization_config") or {}
    method = told.get("quant_method")
    if method not in (None, "fp8", "mxfp4"):
        raise UserError(
            f"config.json: quantization_config of {method}; allowed: fp8 in blocks, mxfp4, or none; get the "
            "unquantised checkpoint"
        )
    rows, columns = told.get("weight_block_size") or (128, 128)
    return int(rows), int(columns)


def shape_of(told: Described) -> Decoder:
    """Return the model that a configuration describes, on the meta device."""
    with on_no_memory():
        model: nn.Module = get_paper(told.family.paper).build(told.settings)
    assert isinstance(model, Decoder)
    for module in model.modules():
        if isinstance(module, Attention):
            module.norm_eps, module.window = told.eps, told.window or module.window
            if not told.tempered:
                module.temperature = None
    for name, module in model.named_modules():
        # The norms inside latent attention have 1e-6, whatever the configuration says.
        if isinstance(module, RMSNorm) and not name.endswith(("kv_norm", "query_norm")):
            module.eps = told.eps
        elif isinstance(module, Attention) and module.qk_norm in ("head", "width"):
            module.query_norm.eps = module.key_norm.eps = told.eps
    if not hasattr(told.settings, "rope_scaling"):
        scaling = RopeScaling.parse(told.rope_scaling)
        model.rotary = RotaryPositions(model.rotary.head_dim, told.rope_theta, scaling)
    return model


def fill(wanted: Iterable[Piece], stored: Stored, *, tied: bool) -> None:
    """Copy every tensor into its place. Raises: UserError for one that is missing, misshapen, or left."""
    for piece in wanted:
        if piece.copy and not stored.has(piece.name):
            continue
        given = stored.take(piece.name, piece.shape)
        if piece.copy and not torch.equal(piece.read(), given.to(piece.views[0].dtype)):
            raise UserError(f"tensor {piece.name} differs from the one that it repeats; allowed: equal ones")
        if not piece.copy:
            piece.write(given)
    stored.finish(tied)


def load_decoder(folder: str | Path, *, dtype: str = "auto", trust: bool = False) -> Decoder:
    """Return the decoder of a folder with config.json and safetensors, in evaluation mode.

    Args: `dtype` "auto" (what is stored; bf16 for FP8 and MXFP4), "fp32" or "bf16"; `trust` reads pickles.
    Raises: UserError as `from_hf`, and for a folder that holds no whole checkpoint.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    folder = Path(folder)
    config = read_config(folder)
    family_of(config)
    tensors = TensorFiles(folder, trust)
    return from_hf(config, tensors, dtype=DTYPES[dtype] or stored_dtype(tensors))


def stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return what a checkpoint is read as: its embedding's dtype, which is never quantised."""
    for name in tensors:
        if name.endswith("embed_tokens.weight") and tensors[name].dtype in _READ_AS:
            return tensors[name].dtype
    return torch.float32
