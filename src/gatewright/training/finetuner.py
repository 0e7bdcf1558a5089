"""A trainer that goes on from trained weights, on a task: the model learns to write the label of a text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gatewright.backbones import Decoder
from gatewright.data import Corpus
from gatewright.errors import UserError
from gatewright.evaluation import Bits
from gatewright.evaluation.candidates import Score, candidate_scores, score_of
from gatewright.training.checkpoint import Checkpoint, save_checkpoint
from gatewright.training.distiller import Distiller, digest_of
from gatewright.training.interrupt import StopRequest
from gatewright.training.loop import evaluation_is_due
from gatewright.training.run import TrainRun
from gatewright.training.runlog import RunLog
from gatewright.training.state import saved_buffers
from gatewright.training.task_rows import TaskRows
from gatewright.training.tasks import ask
from gatewright.training.trainer import Trainer


@torch.no_grad()
def copy_weights(source: nn.Module, model: nn.Module) -> None:
    """Copy every weight and what rules have learned. Raises: UserError where the two are of other shapes."""
    given, wanted = (dict([*own.named_parameters(), *saved_buffers(own)]) for own in (source, model))
    shapes = [{name: tuple(v.shape) for name, v in own.items()} for own in (given, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "the trained weights are not those of this model; allowed: the settings that they were trained "
            "with, but for dropout and capacity"
        )
    for name, value in wanted.items():
        value.copy_(given[name])


class FineTuner(Trainer):
    """Trains a decoder of trained weights on a task; everything but start, rows and score is a trainer's.

    The loss is that of the label and the end behind it; the text is only read. At each evaluation the dev
    texts are scored, and the weights of the best score (accuracy, then nats; the earlier among equals) stay
    beside the live ones until `take_best`.
    Args: `start` is the trained model, which stays as it is. Raises: UserError if it is no decoder.
    """

    def __init__(
        self, run: TrainRun, text: TaskRows, start: nn.Module, name: str = "model", *more: Any
    ) -> None:
        if not isinstance(start, Decoder):
            raise UserError(
                f"paper {run.paper!r} is no decoder with attention; allowed: one that is; its cache scores "
                "the labels"
            )
        self.text, self._start, self.start_digest = text, start, digest_of(start)
        self.best: dict[str, Tensor] = {}
        self.best_at: dict[str, Any] = {}
        super().__init__(run, cast(Corpus, text), name, *more)
        del self._start

    def fresh_model(self) -> Any:
        """Return the model with the trained weights."""
        model: nn.Module = super().fresh_model()
        copy_weights(self._start, model)
        return model

    def window(self) -> int:
        """Return the predicted tokens of a row of the task."""
        return self.text.window

    def ask(self, model: nn.Module, micro: Tensor, key: Tensor) -> tuple[Any, Tensor]:
        """Return a model's logits [1, N, V] at the labels and the ends behind them, and those ids [1, N]."""
        output, targets = ask(model, self.objective, micro, key)
        first = self.text.label_at - 1
        ids = targets[:, first:]
        ended = ids == self.text.tokenizer.eot
        wanted = ended.cumsum(1) - ended.long() == 0
        return output._replace(logits=output.logits[:, first:][wanted][None]), ids[wanted][None]

    def _validation_text(self) -> dict[str, np.ndarray]:
        return {}

    def scores(self, part: str) -> Tensor:
        """Return ln p(label | text) of a part's texts and every label, [N, C], with the live weights."""
        prompts = torch.from_numpy(self.text.prompts[part]).to(self.device)
        return candidate_scores(cast(Decoder, self.model), prompts, self.text.candidates)

    def score(self, part: str) -> Score:
        """Return how the live weights do on a part."""
        return score_of(self.scores(part), torch.from_numpy(self.text.labels[part]))

    def evaluate(self) -> Bits:
        """Return bits per byte of the dev labels; add the score to the curve and keep the best weights."""
        scores, right = self.scores("dev"), torch.from_numpy(self.text.labels["dev"])
        found = score_of(scores, right)
        point = {"step": self.step, "accuracy": found.accuracy, "nats": found.nats, "seconds": self.seconds}
        self.history.curve.append(point)
        if not self.best or (found.accuracy, -found.nats) > (self.best_at["accuracy"], -self.best_at["nats"]):
            self.best_at = {key: point[key] for key in ("step", "accuracy", "nats")}
            self.best = {name: value.detach().clone() for name, value in self._state.items()}
        nats = float(-scores.gather(-1, right[:, None]).sum())
        sizes = [len(label.encode()) for label in self.text.task.labels]
        num_bytes = sum(sizes[label] for label in right.tolist())
        tokens = sum(len(self.text.candidates[label]) for label in right.tolist())
        return Bits(nats / math.log(2) / num_bytes, {}, num_bytes, nats / tokens)

    @torch.no_grad()
    def take_best(self) -> None:
        """Put the weights of the best dev score into the model."""
        for name, value in self.best.items():
            self._state[name].copy_(value)

    def checkpoint(self) -> Checkpoint:
        """Return a trainer's checkpoint with the best weights so far, and what was begun from."""
        held = super().checkpoint()
        tensors = {**held.tensors, "best": self.best} if self.best else held.tensors
        more = {"best": self.best_at, "start": self.start_digest}
        return Checkpoint(held.step, tensors, {**held.state, **more})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue. Raises: UserError also where it was begun from other weights."""
        if checkpoint.state.get("start", self.start_digest) != self.start_digest:
            raise UserError(
                "the run was begun from other trained weights; allowed: the same RUN; give another --out"
            )
        super().restore(checkpoint)
        self.best_at = dict(checkpoint.state["best"])
        self.best = {name: value.clone() for name, value in checkpoint.tensors.get("best", {}).items()}


def tuned_run(
    run: TrainRun, settings: Any, text: TaskRows, rows: int, steps: int, **changes: Any
) -> TrainRun:
    """Return the run of a fine-tuning from the one that trained the weights: steps of `rows` examples, a
    short warm-up, then a cosine; `changes` are its other settings.
    """
    size = rows * text.window
    own: dict[str, Any] = {"schedule": "cosine", "warmup_steps": max(1, steps // 10), "final_rate": 0.02}
    own |= {"accumulation": 1, "ema": 0.0, "minutes": None, "until_loss": None, "data_fraction": 1.0}
    own |= {"model": settings, "tokens": steps * size, "batch_tokens": size, "weight_decay": 0.01}
    return dataclasses.replace(run, **own | changes)


def fit(
    trainer: FineTuner,
    folder: Path,
    stop: StopRequest,
    show: Callable[[float, str], None],
    log: RunLog | None = None,
) -> bool:
    """Train from where the trainer is to the end of its run, with checkpoints in `folder`; return whether it
    came there. Then the best weights are in the model, and saved.
    """
    run = trainer.run
    while not trainer.done and not stop:
        record = trainer.advance()
        if trainer.step % run.log_every == 0:
            show(trainer.progress, f"loss {record['loss']:.3f}")
            if log is not None:
                log.write("step", record)
        if evaluation_is_due(trainer):
            trainer.evaluate()
            if log is not None:
                log.write("evaluation", trainer.history.curve[-1])
        if trainer.step % run.checkpoint_every == 0:
            save_checkpoint(folder, trainer.checkpoint(), run.keep_checkpoints)
    if trainer.done:
        trainer.take_best()
    save_checkpoint(folder, trainer.checkpoint(), run.keep_checkpoints)
    return trainer.done


class TaughtFineTuner(FineTuner, Distiller):
    """A fine-tuner whose task loss is partly a teacher's: `FineTuner`'s arguments, then the teacher and its
    weight as `Distiller` takes them, and False: the start is the trained one, not the teacher's.
    """
