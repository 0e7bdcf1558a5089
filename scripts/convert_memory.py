"""Measure the memory of a checkpoint's load, conversion and verification, above the files that are mapped.

    python scripts/convert_memory.py FOLDER [--layers 17]

Writes a random OLMoE in bf16 to FOLDER/in (64 experts of width 256, 61 million parameters a layer with
17 layers 1.04 billion), loads it, and converts it to FOLDER/out with --verify. Prints one JSON line: seconds
and peak of anonymous memory of each, and what the process held before. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gatewright
from gatewright.conversion.beside import write_json
from gatewright.conversion.configurations import describe
from gatewright.conversion.decoders import shape_of
from gatewright.conversion.families import FAMILIES
from gatewright.conversion.pieces import pieces
from gatewright.conversion.shards import Entry, shard_names, split, write_index, write_shard
from gatewright.experiments.convert import ConvertRun, convert

EVERY = 0.01  # seconds between two looks


def anonymous() -> int:
    """Return the bytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def peak_of(call: Callable[[], Any]) -> tuple[int, float]:
    """Return the largest anonymous memory while `call` runs, as seen every 10 ms, and its seconds."""
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(seen), time.monotonic() - start


def write_random(folder: Path, layers: int) -> int:
    """Write the checkpoint, a tensor at a time, and return its parameters."""
    config = {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "vocab_size": 50304,
        "hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096,
        "num_experts": 64, "num_experts_per_tok": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "norm_topk_prob": False, "rope_theta": 10000.0,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    model = shape_of(describe(config))
    entries = [Entry(p.name, torch.bfloat16, p.shape) for p in pieces(model, FAMILIES["olmoe"])]

    def draw(entry: Entry) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(entry.name.encode()))
        value = torch.randn(entry.shape, generator=generator)
        return (1 + 0.1 * value if len(entry.shape) == 1 else value * entry.shape[-1] ** -0.5).bfloat16()

    shards = split(entries, 500_000_000)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        write_shard(folder / name, shard, draw)
    write_index(folder, shards)
    write_json(folder / "config.json", config)
    return sum(entry.size for entry in entries) // 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=17)
    given = parser.parse_args()
    torch.set_num_threads(1)
    parameters = write_random(given.folder / "in", given.layers)
    gc.collect()
    told: dict[str, Any] = {"parameters": parameters, "bytes_before": anonymous()}

    def load() -> None:
        model = gatewright.load(given.folder / "in")
        with torch.no_grad():
            model(torch.arange(8)[None])

    told["bytes_load"], told["seconds_load"] = peak_of(load)
    gc.collect()
    run = ConvertRun(verify=True)
    told["bytes_convert"], told["seconds_convert"] = peak_of(
        lambda: print(convert(given.folder / "in", given.folder / "out", run).to_text())
    )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
