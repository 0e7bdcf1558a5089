"""`gatewright translate RUN --text ...`: translate with a run of `gatewright pairs`."""

from __future__ import annotations

import sys

from .run import Common, Outcome, command, prepare_process


def main(argv: list[str]) -> int:
    """Run the command; a translation per line."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Translate and return the texts."""
    from ..beams import BeamSearch
    from ..errors import UserError
    from ..experiments.translating import TranslateSettings, open_translator
    from .parse import settings_from, the_word

    prog = "gatewright translate"
    run, rest = the_word(argv, prog, "RUN", "the --out folder of `gatewright pairs`")
    (s,) = settings_from(rest, TranslateSettings, prog=prog, words="RUN", toml=common.from_)
    search = BeamSearch(s.beams, s.alpha, s.max_length)
    prepare_process(s.threads)
    translator = open_translator(run)
    texts = s.text or tuple(line.strip() for line in sys.stdin if line.strip())
    if not texts:
        raise UserError("no text to translate; give --text, or lines on standard input")
    found = translator.translate(texts, s.into, search)
    data = {"run": run, "step": translator.step, "translations": found}
    return Outcome(data, "\n".join(own["text"] for own in found))
