"""One training step of a small decoder with any losses, and step times of two sides in alternation."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gatewright.backbones import LanguageModel
from gatewright.objectives import NextToken
from gatewright.parts.draws import fold
from gatewright.training.precision import autocast
from gatewright.training.state import update_rules

Counted = dict[str, dict[str, Tensor]]


class Stream(Protocol):
    """Batches by step."""

    def batch(self, step: int) -> np.ndarray:
        """Return [rows, context + 1] token ids."""


class StepSettings(Protocol):
    """What a step needs to know."""

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""

    @property
    def learning_rate(self) -> float:
        """The peak."""

    @property
    def warmup_steps(self) -> int:
        """Steps up to the peak."""

    @property
    def weight_decay(self) -> float:
        """AdamW's."""


class Stepper:
    """A model, its optimizer and its place in the stream; the rate warms up and falls as a cosine to a
    tenth.
    """

    def __init__(
        self,
        model: LanguageModel,
        stream: Stream,
        settings: StepSettings,
        losses: Mapping[str, float],
        seed: int,
        precision: str = "fp32",
    ) -> None:
        self.model, self.stream, self.settings, self.seed = model, stream, settings, seed
        self.precision = precision
        self.objective = NextToken(losses=dict(losses))
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.routers = model.routers()
        self.step = 0

    def advance(self) -> tuple[float, Counted]:
        """Take one step; return its task loss in nats per token and what each router counted."""
        s = self.settings
        warm = min(1.0, (self.step + 1) / max(s.warmup_steps, 1))
        progress = self.step / max(s.steps, 1)
        rate = s.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = torch.from_numpy(self.stream.batch(self.step))
        with autocast(self.precision, batch.device):
            output = self.model(batch[:, :-1], key=fold(torch.tensor(self.seed), self.step))
            loss = self.objective(output, batch[:, 1:])
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        keys = ("counts", "kept", "tokens", "unrouted")
        counted = {name: {key: getattr(own, key) for key in keys} for name, own in output.stats.items()}
        update_rules(self.routers, counted)
        self.step += 1
        return float(loss.task.detach()), counted


def step_time_ratio(baseline: Stepper, other: Stepper, rounds: int) -> dict[str, Any]:
    """Return other's step time over the baseline's: median and range of `rounds` paired ratios.

    The sides alternate and take turns in going first; two warm-up steps of each are not counted.
    """
    for side in (baseline, other):
        for _ in range(2):
            side.advance()
    pairs = []
    for turn in range(rounds):
        order = (baseline, other) if turn % 2 == 0 else (other, baseline)
        took = {}
        for side in order:
            started = time.perf_counter()
            side.advance()
            took[id(side)] = time.perf_counter() - started
        pairs.append((took[id(baseline)], took[id(other)]))
    ratios = [b / a for a, b in pairs]
    return {
        "median": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "baseline_ms": statistics.median(1e3 * a for a, _ in pairs),
        "ms": statistics.median(1e3 * b for _, b in pairs),
        "raw_ms": [[1e3 * a, 1e3 * b] for a, b in pairs],
    }
