"""`gatewright pairs [PAPER]`: train a model that translates, on lines in several languages."""

from __future__ import annotations

import dataclasses

from .run import INTERRUPTED, Common, Outcome, command, prepare_process

# Fields that follow from the text, or that the command fills.
HIDDEN = ("paper", "model", "vocab_size", "source_vocab_size")


def main(argv: list[str]) -> int:
    """Run the command; a run that Ctrl-C ended exits with 130, its checkpoint saved."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Train and return the result."""
    from ..experiments.pairs_run import PAPERS, TranslatorRun
    from ..papers import get_paper
    from .parse import read_toml, settings_from, take_words

    words, rest = take_words(argv, most=1)
    in_file = str(read_toml(common.from_).get("paper", "")) if common.from_ else ""
    base = TranslatorRun(paper=words[0] if words else in_file or TranslatorRun.paper)
    prog, intro = f"gatewright pairs {base.paper}", f"Papers: {', '.join(PAPERS)} (their model flags differ)."
    own = get_paper(base.paper).Settings()
    run, model = settings_from(rest, base, own, prog=prog, toml=common.from_, hidden=HIDDEN, intro=intro)
    prepare_process(run.threads)
    from ..experiments.translator import train_translator

    result = train_translator(dataclasses.replace(run, model=model))
    return Outcome(result.to_dict(), result.to_text(), INTERRUPTED if result.stopped else 0)
