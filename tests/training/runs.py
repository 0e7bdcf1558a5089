"""Tiny runs on text of their own: what the training tests train, and how they compare what comes out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from gatewright.data import Corpus
from gatewright.data.stream import TokenStream
from gatewright.data.tokenizer import ByteTokenizer
from gatewright.papers.mixtral import Settings
from gatewright.training import TrainRun
from gatewright.training.checkpoint import Checkpoint, newest_checkpoint
from gatewright.training.trainer import Trainer

# Numbers that the clock makes: no two runs share them.
TIMES = {"seconds", "step_seconds", "seconds_per_step"}

TINY: dict[str, Any] = {
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_selected": 2,
    "expert_width": 8,
    "ffn_width": 16,
    "context": 16,
}

LOOP: dict[str, Any] = {
    "batch_tokens": 64,
    "warmup_steps": 4,
    "ema": 0.9,
    "evaluations": 4,
    "eval_bytes": 120,
    "log_every": 1,
    "checkpoint_every": 7,
}


def write_text(root: Path, domains: tuple[str, ...] = ("alpha", "beta"), size: int = 2000) -> list[str]:
    """Write eight documents per domain, made of words of their own; return the domains' folders."""
    for number, domain in enumerate(domains):
        draw = random.Random(number)
        (root / domain).mkdir(parents=True, exist_ok=True)
        for document in range(8):
            letters = [draw.choices("abcdefghijklmnop", k=draw.randint(2, 7)) for _ in range(60)]
            words = ["".join(word) for word in letters]
            text = "".join(draw.choice(words) + draw.choice(" \n .") for _ in range(size // 5))
            (root / domain / f"{document}.txt").write_text(text, encoding="utf-8")
    return [str(root / domain) for domain in domains]


def tiny_run(data: list[str], out: Path | str = "unused", steps: int = 20, **changes: Any) -> TrainRun:
    """Return a run of `steps` steps on `data`; names of the model's settings in `changes` go to the model."""
    own = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**TINY | {k: v for k, v in changes.items() if k in own})
    loop = LOOP | {k: v for k, v in changes.items() if k not in own}
    tokens = loop.pop("tokens", steps * loop["batch_tokens"])
    return TrainRun(**loop, model=settings, data=tuple(data), out=str(out), tokens=tokens)


def train_argv(data: list[str], out: Path, steps: int, *more: str) -> list[str]:
    """Return the command line of such a run with one layer."""
    settings = TINY | LOOP | {"tokens": steps * LOOP["batch_tokens"], "num_layers": 1, "out": out}
    flags = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return ["train", "mixtral", "--data", *data, *flags, *more]


def timeless(value: Any) -> Any:
    """Return plain data without the numbers that the clock makes."""
    if isinstance(value, Mapping):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def digest(checkpoint: Checkpoint) -> str:
    """Return one sha256 over every tensor and all state but times."""
    sha = hashlib.sha256()
    for file, tensors in sorted(checkpoint.tensors.items()):
        for name, tensor in sorted(tensors.items()):
            sha.update(f"{file}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    sha.update(json.dumps(timeless(checkpoint.state), sort_keys=True).encode())
    return sha.hexdigest()


def final_digest(out: Path) -> str:
    """Return the digest of the newest checkpoint of a run's folder."""
    held = newest_checkpoint(out / "checkpoints")
    assert held is not None
    return digest(held)


def read_log(out: Path) -> list[Any]:
    """Return log.jsonl without times."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [timeless(json.loads(line)) for line in lines]


def advance(trainer: Trainer, steps: int) -> list[float]:
    """Take steps and return their losses."""
    return [trainer.advance()["loss"] for _ in range(steps)]


class FixedText:
    """Stands in for a corpus: two sentences over and over, so that no room but training moves the numbers."""

    domains = ("fixed",)
    fingerprint = "fixed"
    tokenizer = ByteTokenizer()

    def __init__(
        self, text: bytes = b"the quick brown fox jumps over the lazy dog; pack my box with jugs. "
    ) -> None:
        self.tokens = np.frombuffer(text * 40, dtype=np.uint8).astype(np.int64)

    def stream(self, batch_size: int, context: int, *, seed: int = 0, fraction: float = 1.0) -> TokenStream:
        """Return the text's windows in the order of a seed."""
        return TokenStream(self.tokens, batch_size, context, seed)

    def valid(self, domain: str) -> Any:
        """Return the same text."""
        return SimpleNamespace(tokens=self.tokens)


def fixed_trainer(steps: int = 20, paper: str = "mixtral", model: Any = None, **changes: Any) -> Trainer:
    """Return a trainer on FixedText; `changes` as `tiny_run` takes them."""
    run = dataclasses.replace(tiny_run([], steps=steps, **changes), paper=paper)
    run = run if model is None else dataclasses.replace(run, model=model)
    return Trainer(run, cast(Corpus, FixedText()))
