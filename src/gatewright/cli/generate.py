"""`gatewright generate MODEL`: continue a text with any model that is opened here, shown as it is drawn."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TextIO

from .run import Common, Outcome, command, prepare_process, shown_live


@dataclass(frozen=True)
class GenerateSettings:
    """How the text is continued."""

    prompt: str = ""
    """the text to continue; none begins a new document"""
    ahead: bool = False
    """let the model's further block (deepseek_v3) guess tokens: the same text, sooner"""


def main(argv: list[str]) -> int:
    """Run the command; the text goes to stdout piece by piece, unless --json asks for it whole."""
    stdout = sys.stdout
    return command(argv, lambda rest, common: work(rest, common, stdout))


def work(argv: list[str], common: Common, stdout: TextIO) -> Outcome:
    """Generate, show piece by piece, and return the text."""
    from ..generation import Sampling
    from ..generation.opened import Opening, open_text_model
    from ..generation.writing import Writing, continue_text
    from .parse import settings_from, the_word

    prog, what = (
        "gatewright generate",
        "a run's --out folder, a folder of transformers, a .gguf file, or smollm2",
    )
    given, rest = the_word(argv, prog, "MODEL", what)
    owners = (GenerateSettings, Writing, Sampling(temperature=0.8, top_p=0.95), Opening)
    toml = common.from_
    s, writing, sampling, opening = settings_from(rest, *owners, prog=prog, words="MODEL", toml=toml)
    prepare_process(opening.threads)
    opened = open_text_model(given, opening)
    show, tell = shown_live(stdout, common.json)
    more = {"ahead": s.ahead, "show": show, "tell": tell}
    data = continue_text(opened, s.prompt, sampling, writing, **more)
    return Outcome({"model": given, **data}, "\n")
