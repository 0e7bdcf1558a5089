"""Writing safetensors one tensor at a time, in shards with an index, so that no shard stands in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gatewright.conversion.files import INDEX, SINGLE

_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def split(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Return the entries in shards of at most `limit` bytes, in order; a larger tensor has a shard alone."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    return shards


def shard_names(count: int) -> list[str]:
    """Return the files' names as transformers has them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shard(path: Path, entries: Sequence[Entry], get: Callable[[Entry], Tensor]) -> None:
    """Write a file of these tensors; it has its name only when it is whole.

    Layout: the header's length as 8 bytes, the header as JSON, the numbers in the header's order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        offsets = [at, at := at + entry.size]
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets,
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            value = get(entry).contiguous()
            assert value.dtype == entry.dtype, entry
            assert tuple(value.shape) == entry.shape, entry
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_index(folder: Path, shards: Sequence[Sequence[Entry]]) -> None:
    """Write the index of several shards; one file has none."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    where = {entry.name: file for file, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.size for shard in shards for entry in shard)
    told = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
