"""`gatewright finetune RUN --task NAME`: a run trained on a small real task, and how often it is right."""

from __future__ import annotations

from .run import INTERRUPTED, Common, Outcome, command, prepare_process


def main(argv: list[str]) -> int:
    """Run the command; one that Ctrl-C ended exits with 130, its checkpoint saved."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Fine-tune and return the result."""
    from ..experiments.finetune import FineTuneRun, finetune
    from .parse import settings_from, the_word

    run, rest = the_word(argv, "gatewright finetune", "RUN", "the --out folder of a run")
    (options,) = settings_from(rest, FineTuneRun, prog="gatewright finetune", words="RUN", toml=common.from_)
    prepare_process(options.threads)
    result = finetune(run, options)
    return Outcome(result.to_dict(), result.to_text(), INTERRUPTED if result.stopped else 0)
