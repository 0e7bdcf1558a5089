"""The settings of a run on a paper's model: `gatewright train PAPER ...` and `gatewright race PAPER ...`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .parse import read_toml, settings_from, take_words

# Fields of a run that its command fills: the positional word and the paper's own settings.
HIDDEN = ("paper", "model")


def run_from(argv: list[str], kind: type, toml: Path | None, prog: str) -> Any:
    """Return the run (`TrainRun` or `RaceRun`) that the command line and the TOML file describe.

    The first word is a paper's id, or the name of a published size ("olmoe-1b-7b"), from whose settings the
    flags then start. Raises UserError for an unknown word, flag, key or value.
    """
    words, rest = take_words(argv, most=1)
    base = kind()
    in_file = str(read_toml(toml).get("paper", "")) if toml else ""
    paper, model = _model_of(words[0] if words else in_file or base.paper, base)
    run, model = settings_from(
        rest, base, model, prog=f"{prog} {paper}", toml=toml, hidden=HIDDEN, intro=_intro(base.paper, prog)
    )
    return dataclasses.replace(run, paper=paper, model=model)


def _intro(default: str, prog: str) -> str:
    from ..papers import published, published_names, text_papers, trained_papers

    papers = trained_papers() if prog.endswith("train") else text_papers()
    sizes = [name for name in published_names() if published(name)[0] in papers]
    return (
        f"In place of {default}, the default: {', '.join(papers)} (their model flags differ),\n"
        f"or a published size as the start: {', '.join(sizes)}."
    )


def _model_of(word: str, base: Any) -> tuple[str, Any]:
    """Return the paper's id and the settings that flags start from."""
    from ..papers import get_trained_paper, published, published_names

    if word in published_names():
        return published(word)
    if word == base.paper and base.model is not None:
        return word, base.model
    return word, get_trained_paper(word).Settings()
