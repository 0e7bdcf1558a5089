"""Train a model of pairs on translations: steps that resume bit for bit, and the loss of held-out pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from gatewright.backbones import DecoderOutput, PairModel
from gatewright.data.parallel import PairBatch
from gatewright.errors import Diverged, UserError
from gatewright.objectives import NextToken
from gatewright.objectives.next_token import Loss
from gatewright.parts.draws import fold
from gatewright.training.checkpoint import (
    Checkpoint,
    check_tensors,
    clear_leftovers,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from gatewright.training.optimizer import ClippedAdamW
from gatewright.training.schedule import rate_factor
from gatewright.training.state import first_nonfinite, saved_buffers, update_rules


class PairStream(Protocol):
    """Batches by step."""

    def batch(self, index: int) -> PairBatch:
        """Return batch `index`."""


@dataclass(frozen=True)
class PairRun:
    """How a model of pairs is trained: a linear warm-up, then a cosine to `final_rate` of the peak."""

    steps: int
    learning_rate: float = 5e-3
    warmup_steps: int = 50
    final_rate: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        if min(self.steps, self.checkpoint_every) < 1 or not self.learning_rate > 0:
            raise UserError(
                f"steps {self.steps}, checkpoint_every {self.checkpoint_every}, learning_rate "
                f"{self.learning_rate}; allowed: 1 or more, 1 or more, above 0"
            )


def read(model: PairModel, batch: PairBatch, key: Tensor | None = None) -> tuple[DecoderOutput, Tensor]:
    """Return a model's output at the real positions of the targets, logits [1, N, V], and their labels
    [1, N]: what an objective of texts takes.
    """
    source, source_mask, target, labels, mask = (
        torch.from_numpy(a)
        for a in (batch.source, batch.source_mask, batch.target, batch.labels, batch.target_mask)
    )
    output = model(source, target, source_mask, mask, key=key)
    return DecoderOutput(output.logits[mask].unsqueeze(0), output.stats), labels[mask].unsqueeze(0)


class PairTrainer:
    """Advances one model of pairs, of any backbone with `EncoderDecoder`'s call."""

    def __init__(self, model: PairModel, objective: NextToken, stream: PairStream, run: PairRun) -> None:
        self.model, self.objective, self.stream, self.run = model, objective, stream, run
        self.optimizer = ClippedAdamW(
            model.parameters(),
            clip=run.clip,
            lr=run.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=run.weight_decay,
        )
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.curve: list[dict[str, float]] = []
        self.routers = model.routers()
        self._names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
        self._state = {**dict(model.named_parameters()), **dict(saved_buffers(model))}

    def advance(self) -> Loss:
        """Take one step and return its loss. Raises: Diverged where it is not finite."""
        run, started = self.run, time.process_time()
        progress = self.step / run.steps
        factor = rate_factor(
            "cosine", self.step, progress, warmup_steps=run.warmup_steps, decay_share=0.0,
            final_rate=run.final_rate,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = run.learning_rate * factor
        key = fold(torch.tensor(run.seed), self.step)
        batch = self.stream.batch(self.step)
        output, labels = read(self.model, batch, key)
        loss = self.objective(output, labels)
        loss.total.backward()
        fields = ("counts", "kept", "nonfinite", "tokens")
        counted = {name: {f: getattr(own, f) for f in fields} for name, own in output.stats.items()}
        norm = float(self.optimizer.total_norm())
        if not math.isfinite(float(loss.task.detach()) + norm):
            raise Diverged(
                f"step {self.step + 1}: loss {float(loss.task.detach())}, gradient norm {norm}; "
                f"{first_nonfinite(self._names, counted)}; lower the learning rate"
            )
        self.optimizer.step(norm=norm)
        self.optimizer.zero_grad(set_to_none=True)
        update_rules(self.routers, counted)
        self.step += 1
        self.tokens += int(batch.source_mask.sum() + batch.target_mask.sum())
        self.seconds += time.process_time() - started
        return loss

    def save(self, folder: Path) -> None:
        """Write a checkpoint below `folder`; one stays."""
        state = {"seconds": self.seconds, "tokens": self.tokens, "curve": self.curve}
        tensors = {"model": self._state, "optimizer": optimizer_tensors(self.optimizer, self._names)}
        save_checkpoint(folder, Checkpoint(self.step, tensors, state), keep=1)

    def resume(self, folder: Path) -> None:
        """Go on from the newest checkpoint below `folder`, if there is one of these sizes."""
        clear_leftovers(folder)
        held = newest_checkpoint(folder)
        if held is None:
            return
        shapes = {name: tuple(p.shape) for p, name in self._names.items()}
        buffers = {name: tuple(b.shape) for name, b in saved_buffers(self.model)}
        check_tensors(held.tensors, shapes, averaged=False, buffers=buffers)
        with torch.no_grad():
            for name, value in self._state.items():
                value.copy_(held.tensors["model"][name])
        restore_optimizer(self.optimizer, self._names, held.tensors["optimizer"])
        self.step = held.step
        self.seconds, self.tokens = held.state["seconds"], held.state["tokens"]
        self.curve = held.state["curve"]


def train_pairs(
    trainer: PairTrainer,
    folder: Path,
    show: Callable[[int, float], None] = lambda step, loss: None,
    measure: Callable[[], dict[str, float]] = dict,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train to the end of the run, from the newest checkpoint in `folder`; `show` gets a step and its loss
    now and then, and the trainer's curve a point, with what `measure` finds at it. Where `stop` asks for it,
    training ends with a checkpoint after the step at hand.
    """
    trainer.resume(folder)
    run = trainer.run
    every = max(1, run.steps // 20)
    asked = stop()
    while trainer.step < run.steps and not asked:
        loss = float(trainer.advance().task.detach())
        if trainer.step % every == 0 or trainer.step == run.steps:
            trainer.curve.append({"step": trainer.step, "loss": loss, **measure()})
            show(trainer.step, loss)
        asked = stop()
        if trainer.step % run.checkpoint_every == 0 or trainer.step == run.steps or asked:
            trainer.save(folder)


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[PairBatch]) -> tuple[float, int]:
    """Return nats of all of the targets' tokens together, ends included, and how many they are."""
    total, count, was = 0.0, 0, model.training
    model.eval()
    for batch in batches:
        output, labels = read(model, batch)  # type: ignore[arg-type]
        total += labels.numel() * float(NextToken()(output, labels).task)
        count += labels.numel()
    model.train(was)
    return total, count
