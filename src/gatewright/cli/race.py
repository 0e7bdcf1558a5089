"""`gatewright race [PAPER]`: a sparse model against its dense twin on the same tokens."""

from __future__ import annotations

from .run import INTERRUPTED, Common, Outcome, command, prepare_process


def main(argv: list[str]) -> int:
    """Run the command. Either outcome of the race exits with 0; a race that Ctrl-C ended with 130."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Race and return the result."""
    from ..experiments.race_run import RaceRun
    from .paper import run_from

    run = run_from(argv, RaceRun, common.from_, "gatewright race")
    prepare_process(run.threads)
    from ..experiments.race import race

    result = race(run)
    return Outcome(result.to_dict(), result.to_text(), INTERRUPTED if result.stopped else 0)
