"""`gatewright distill RUN`: a dense student of a sparse run, and what it keeps of the teacher's gain."""

from __future__ import annotations

from .run import INTERRUPTED, Common, Outcome, command, prepare_process


def main(argv: list[str]) -> int:
    """Run the command; one that Ctrl-C ended exits with 130, its checkpoint saved."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Distil and return the result."""
    from ..experiments.distill import DistillRun, distill
    from .parse import settings_from, the_word

    teacher, rest = the_word(argv, "gatewright distill", "RUN", "the --out folder of a sparse run")
    (options,) = settings_from(rest, DistillRun, prog="gatewright distill", words="RUN", toml=common.from_)
    prepare_process(options.threads)
    result = distill(teacher, options)
    return Outcome(result.to_dict(), result.to_text(), INTERRUPTED if result.stopped else 0)
