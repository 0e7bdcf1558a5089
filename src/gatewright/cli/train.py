"""`gatewright train [PAPER]`: train one model; checkpoints, run log, result and report go to --out."""

from __future__ import annotations

from .run import INTERRUPTED, Common, Outcome, command, prepare_process


def main(argv: list[str]) -> int:
    """Run the command; a run that Ctrl-C ended exits with 130, its checkpoint saved."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Train and return the result."""
    from ..training.run import TrainRun
    from .paper import run_from

    run = run_from(argv, TrainRun, common.from_, "gatewright train")
    prepare_process(run.threads)
    from ..training.loop import train

    result = train(run)
    return Outcome(result.to_dict(), result.to_text(), INTERRUPTED if result.stopped else 0)
