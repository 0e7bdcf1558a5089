"""`gatewright eval OUT`: bits per byte of a run's newest checkpoint, per domain."""

from __future__ import annotations

from .run import Common, Outcome, command, prepare_process


def main(argv: list[str]) -> int:
    """Run the command."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Evaluate and return the result."""
    from ..training.evaluate import EvalRun, evaluate_run
    from .parse import settings_from, the_word

    out, rest = the_word(argv, "gatewright eval", "OUT", "the --out folder of a run")
    (options,) = settings_from(rest, EvalRun, prog="gatewright eval", words="OUT", toml=common.from_)
    prepare_process(options.threads)
    result = evaluate_run(out, options)
    return Outcome(result.to_dict(), result.to_text())
