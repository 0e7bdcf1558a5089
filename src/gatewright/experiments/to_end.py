"""One trainer to the end of its budget, with checkpoints, inside a longer experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gatewright.errors import RunFailure
from gatewright.training.checkpoint import clear_leftovers, newest_checkpoint, save_checkpoint
from gatewright.training.interrupt import StopRequest
from gatewright.training.trainer import Trainer

Show = Callable[[float, str], None]


def run_to_end(trainer: Trainer, folder: Path, what: str, show: Show, stop: StopRequest) -> None:
    """Step until the budget is spent, from the newest checkpoint in `folder`, saving there on the way.

    Raises: RunFailure where a stop is asked for, after a checkpoint.
    """
    run = trainer.run
    clear_leftovers(folder)
    held = newest_checkpoint(folder)
    if held is not None:
        trainer.restore(held)
    while not trainer.done:
        if stop:
            save_checkpoint(folder, trainer.checkpoint(), 1)
            raise RunFailure(f"stopped at {what}; the same command goes on from here")
        loss = trainer.advance()["loss"]
        if trainer.step % run.log_every == 0:
            show(trainer.progress, f"{what}: loss {loss:.3f}")
        if trainer.step % run.checkpoint_every == 0:
            save_checkpoint(folder, trainer.checkpoint(), 1)
