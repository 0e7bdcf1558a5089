"""Peak memory of whole training steps, in a process of their own, against the least that they could need."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from gatewright.backbones import Decoder
from gatewright.data import Corpus
from gatewright.data.stream import TokenStream
from gatewright.evaluation.memory import training_memory
from gatewright.kernels import native
from gatewright.measuring.memory import check_memory_can_be_measured, peak_bytes, resident_bytes
from gatewright.papers import get_text_paper
from gatewright.training import TrainRun
from gatewright.training.allocator import return_big_blocks
from gatewright.training.trainer import Trainer

# The second step finds the optimizer's state in its place.
STEPS = 2
_WINDOWS = 4


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step: what the process came to hold at its `peak`, and what it has to hold.

    `weights`, `optimizer` and `averages` are there all the time, in fp32; `gradients` come as `activations`
    (by the formulas of `gatewright plan`) go, unless micro-batches are accumulated.
    """

    peak: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    accumulation: int

    @property
    def floor(self) -> int:
        """The least that a step holds at its peak."""
        passing = (self.gradients, self.activations)
        held = self.weights + self.optimizer + self.averages
        return held + (sum(passing) if self.accumulation > 1 else max(passing))

    @property
    def over_floor(self) -> float:
        """The peak as a multiple of the floor."""
        return self.peak / self.floor

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, floor and ratio included."""
        return {**dataclasses.asdict(self), "floor": self.floor, "over_floor": self.over_floor}


def step_memory(run: TrainRun, threads: int = 1) -> StepMemory | None:
    """Return the peak of `run`'s training steps on random tokens, measured in a fresh process, and its floor;
    None if that process died of it.

    Raises: UserError where a process's peak cannot be set back.
    """
    check_memory_can_be_measured()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            peak = pool.submit(peak_of_steps, run, threads).result()
        except BrokenProcessPool:
            return None
    return floor_of(run, peak)


def floor_of(run: TrainRun, peak: int) -> StepMemory:
    """Return the StepMemory of a measured peak; nothing is allocated."""
    with torch.device("meta"):
        model = cast(Decoder, get_text_paper(run.paper).build(_settings(run)))
    context = _settings(run).context
    rows = run.batch_tokens // context // run.accumulation
    formula = training_memory(model, run.precision, context, rows, "adamw")
    count = sum(p.numel() for p in model.parameters())
    return StepMemory(
        peak=peak,
        weights=4 * count,
        gradients=4 * count,
        optimizer=8 * count,
        averages=4 * count if run.ema else 0,
        activations=round(formula.recomputed if run.recompute == "blocks" else formula.activations),
        accumulation=run.accumulation,
    )


def peak_of_steps(run: TrainRun, threads: int) -> int:
    """Return the bytes that this process, which should do nothing else, comes to hold for training."""
    torch.set_num_threads(threads)
    # Blocks that are freed leave the process at once, so that its pages are those of live tensors.
    return_big_blocks()
    if native.is_ready():
        torch.ops.gatewright.pool_limit(0)
    # A small model first: libraries allocate on first use.
    small = dataclasses.replace(run, model=None, accumulation=1, batch_tokens=_settings(run, None).context)
    _steps(small, lambda: None)
    before = resident_bytes(reset=True)
    peaks: list[int] = []
    _steps(run, lambda: peaks.append(peak_bytes()))
    return max(peaks) - before


def _steps(run: TrainRun, after: Callable[[], None]) -> None:
    trainer = Trainer(run, random_corpus(run), "measured")
    for _ in range(STEPS):
        trainer.advance()
        after()


def _settings(run: TrainRun, model: Any = ...) -> Any:
    given = run.model if model is ... else model
    return get_text_paper(run.paper).Settings() if given is None else given


def random_corpus(run: TrainRun) -> Corpus:
    """Return what a Trainer needs of a corpus: random tokens of the model's own vocabulary."""
    settings = _settings(run)
    size = _WINDOWS * max(run.batch_tokens, settings.context) + 1
    tokens = np.random.default_rng(0).integers(0, settings.vocab_size, size)
    lengths = np.ones(settings.vocab_size, dtype=np.int64)
    corpus = SimpleNamespace(
        domains=("random",),
        fingerprint="random",
        tokenizer=SimpleNamespace(vocab_size=settings.vocab_size, byte_lengths=lengths),
        stream=lambda rows, context, seed=0, fraction=1.0: TokenStream(tokens, rows, context, seed),
        valid=lambda domain: SimpleNamespace(tokens=tokens),
    )
    return cast(Corpus, corpus)
