"""Evaluate a trained run on validation text, its own or other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatewright.data import open_corpus
from gatewright.errors import UserError
from gatewright.evaluation import take_bytes
from gatewright.papers.registry import get_paper
from gatewright.training.load import load_run
from gatewright.training.precision import autocast
from gatewright.training.runlog import Progress
from gatewright.training.tasks import bits_of


@dataclass(frozen=True)
class EvalRun:
    """Evaluate the newest checkpoint of a run in bits per byte."""

    data: tuple[str, ...] = ()
    """files and folders; their held-out documents are evaluated; none means the text that the run was
    trained on
    """
    eval_bytes: int = 512_000
    """bytes of validation text, spread evenly over the domains"""
    averaged: bool = False
    """evaluate the averaged weights instead of the live ones"""
    int8_experts: bool = False
    """evaluate with the experts' weights in int8"""
    batch_size: int = 16
    """sequences at a time"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    device: str = "cpu"
    """cpu, cuda, or cuda:N"""

    def __post_init__(self) -> None:
        for name in ("eval_bytes", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}; allowed: 1 or more")


@dataclass(frozen=True)
class EvalResult:
    """Bits per byte over all evaluated text and per domain."""

    out: str
    step: int
    bits_per_byte: float
    domains: dict[str, float]
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "out": self.out,
            "step": self.step,
            "bits_per_byte": self.bits_per_byte,
            "domains": self.domains,
            "num_bytes": self.num_bytes,
        }

    def to_text(self) -> str:
        """Return a line per domain and one over all."""
        rows = [f"{domain:24s} {bits:.4f}" for domain, bits in self.domains.items()]
        where = f"bits per byte on {self.num_bytes:,} bytes, step {self.step}"
        total = f"{'all':24s} {self.bits_per_byte:.4f} {where}"
        return "\n".join([*rows, total])


def evaluate_run(out: str | Path, options: EvalRun | None = None) -> EvalResult:
    """Return the run's bits per byte on held-out documents.

    Raises: UserError if `out` holds no run or the data cannot be read.
    """
    options = options or EvalRun()
    if options.threads:
        torch.set_num_threads(options.threads)
    with Progress("eval") as progress:
        loaded = load_run(
            out, device=options.device, averaged=options.averaged, int8_experts=options.int8_experts
        )
        run = loaded.run
        data = options.data or run.data
        saved = "bytes" if loaded.tokenizer.name == "bytes" else str(Path(out) / "tokenizer.json")
        given = saved if options.data else run.tokenizer
        corpus = open_corpus(data, tokenizer=given, seed=run.data_seed, progress=progress.say)
        if corpus.tokenizer.to_json() != loaded.tokenizer.to_json():
            # The text has changed since, and a BPE trained on it now is another one.
            corpus = open_corpus(data, tokenizer=saved, seed=run.data_seed, progress=progress.say)
        share = max(1, options.eval_bytes // len(corpus.domains))
        lengths = corpus.tokenizer.byte_lengths
        texts = {d: take_bytes(corpus.valid(d).tokens, lengths, share) for d in corpus.domains}
        device = torch.device(options.device)
        bits = bits_of(
            loaded.model,
            get_paper(run.paper).objective(loaded.settings),
            texts,
            lengths,
            context=loaded.settings.context,
            batch_size=options.batch_size,
            autocast=autocast(run.precision, device),
        )
    return EvalResult(str(out), loaded.step, bits.bits_per_byte, bits.domains, bits.num_bytes)
