"""`gatewright inspect MODEL_DIR`: where a model sends tokens, a run or a transformers checkpoint."""

from __future__ import annotations

from .run import Common, Outcome, command, prepare_process


def main(argv: list[str]) -> int:
    """Run the command."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Inspect and return the result."""
    from ..experiments.inspect_model import inspect_model
    from ..experiments.inspect_open import InspectRun
    from .parse import settings_from, the_word

    prog, what = "gatewright inspect", "the --out folder of a run, or a checkpoint folder of transformers"
    folder, rest = the_word(argv, prog, "MODEL_DIR", what)
    (options,) = settings_from(rest, InspectRun, prog=prog, words="MODEL_DIR", toml=common.from_)
    prepare_process(options.threads)
    result = inspect_model(folder, options)
    return Outcome(result.to_dict(), result.to_text())
