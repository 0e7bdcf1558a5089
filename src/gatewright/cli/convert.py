"""`gatewright convert SRC DST`: a checkpoint or a run in the layout that other libraries read."""

from __future__ import annotations

from .run import Common, Outcome, command, prepare_process


def main(argv: list[str]) -> int:
    """Run the command."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Convert and return the result."""
    from ..errors import UserError
    from ..experiments.convert import ConvertRun, convert
    from .parse import settings_from, take_words

    prog = "gatewright convert"
    words, rest = take_words(argv, most=2)
    if len(words) < 2 and not {"--help", "-h"} & set(argv):
        raise UserError(
            f"{prog} SRC DST: {'DST' if words else 'SRC'} is missing; give a checkpoint or a run, and a new "
            f"folder; see `{prog} --help`"
        )
    (options,) = settings_from(rest, ConvertRun, prog=prog, words="SRC DST", toml=common.from_)
    prepare_process(options.threads)
    result = convert(words[0], words[1], options)
    return Outcome(result.to_dict(), result.to_text())
