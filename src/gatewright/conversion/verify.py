"""Checks of a written checkpoint: every tensor bit for bit, through our weights and back, and its logits."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.conversion.decoders import from_hf
from gatewright.conversion.families import Family
from gatewright.conversion.files import TensorFiles
from gatewright.conversion.folder import read_config
from gatewright.conversion.pieces import block_pieces
from gatewright.conversion.shards import Entry
from gatewright.errors import RunFailure

TOLERANCE = 1e-4  # of the largest logit, in fp32
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Words that hold one value per layer.
_LISTS = ("layer_types", "no_rope_layers")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same bytes: -0 is not 0, and a NaN is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)))


def check_bits(folder: Path, entries: Sequence[Entry], get: Callable[[Entry], Tensor]) -> int:
    """Return how many tensors were written as they were read, which is all. Raises: RunFailure otherwise."""
    written = TensorFiles(folder)
    wanted = {entry.name for entry in entries}
    if wanted != set(written):
        raise RunFailure(f"{folder} does not hold what was to be written: {min(wanted ^ set(written))}")
    for entry in entries:
        if not same_bits(written[entry.name], get(entry)):
            raise RunFailure(f"{entry.name} in {folder} differs from what was read; convert it again")
    return len(wanted)


def check_round_trip(folder: Path, model: Decoder, family: Family) -> int:
    """Return how many layers' tensors come back bit for bit from our weights, one layer at a time; `model` is
    on the meta device. Raises: RunFailure for one that does not.
    """
    written = TensorFiles(folder)
    for i, block in enumerate(model.layers):
        held = copy.deepcopy(block).to_empty(device="cpu").state_dict(keep_vars=True)
        numbers = [value.detach() for value in held.values() if value.is_floating_point()]
        for value in numbers:
            value.fill_(torch.nan)
        wanted = list(block_pieces(f"model.layers.{i}.", held, family))
        # All first, then all: a place that two tensors fill, or none, would show.
        for piece in wanted:
            piece.write(written[piece.name])
        for piece in wanted:
            stored = written[piece.name]
            if not same_bits(piece.read().to(stored.dtype), stored):
                raise RunFailure(f"{piece.name} in {folder} does not come back from our weights as it was")
        if any(bool(value.isnan().any()) for value in numbers):
            raise RunFailure(f"layer {i} in {folder} holds NaN: it was read so, or a weight got no number")
    return len(model.layers)


class FirstLayers(Mapping[str, Tensor]):
    """The tensors of a checkpoint without those of layers from `count` on."""

    def __init__(self, tensors: TensorFiles, count: int) -> None:
        self._tensors = tensors
        layer = {name: _LAYER.match(name) for name in tensors}
        self._names = [name for name, found in layer.items() if found is None or int(found[1]) < count]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def first_layers(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a configuration of the first `count` layers."""
    told = {**config, "num_hidden_layers": count}
    told |= {name: told[name][:count] for name in _LISTS if told.get(name)}
    for name in ("moe_layers", "mlp_only_layers"):
        if told.get(name):
            told[name] = [layer for layer in told[name] if layer < count]
    return told


@torch.no_grad()
def logits_apart(folder: Path, layers: int) -> tuple[float, int]:
    """Return how far our logits are from transformers', as a share of the largest, over the first `layers`
    layers in fp32, and how many layers that were. One model after the other stands in memory.
    """
    import transformers

    config = read_config(folder)
    count = min(layers, config["num_hidden_layers"])
    told = first_layers(config, count)
    tokens = torch.randint(0, told["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))
    tokens = tokens[:, : told["max_position_embeddings"]]
    ours = from_hf(told, FirstLayers(TensorFiles(folder), count))(tokens, with_stats=False).logits
    kind: Any = getattr(transformers, told["architectures"][0])
    own = kind.config_class.from_dict(told)
    own._attn_implementation = own._experts_implementation = "eager"
    was = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it would list the layers that are left out
    try:
        model = kind.from_pretrained(str(folder), config=own, dtype=torch.float32, local_files_only=True)
    finally:
        transformers.utils.logging.set_verbosity(was)
    theirs = model.eval()(tokens, use_cache=False).logits
    return float((ours - theirs).abs().max() / theirs.abs().max()), count
