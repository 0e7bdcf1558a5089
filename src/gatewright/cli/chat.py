"""`gatewright chat MODEL`: a conversation with a model that has a chat template, typed or piped."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .run import Common, Outcome, command, fail, prepare_process, shown_live


@dataclass(frozen=True)
class ChatSettings:
    """How the conversation begins."""

    system: str = ""
    """what the model is told before the first turn"""
    template: Path | None = None
    """a Jinja file that replaces the model's own chat template"""


def main(argv: list[str]) -> int:
    """Run the command; answers go to stdout piece by piece, unless --json asks for the turns whole."""
    stdout = sys.stdout
    return command(argv, lambda rest, common: work(rest, common, stdout))


def work(argv: list[str], common: Common, stdout: TextIO) -> Outcome:
    """Talk until the input ends, and return the turns."""
    from ..generation import Sampling
    from ..generation.chat import Chat, talk, typed_lines
    from ..generation.opened import Opening, open_text_model
    from ..generation.writing import Writing
    from .parse import settings_from, the_word

    prog, what = "gatewright chat", "a folder of transformers, a .gguf file, smollm2, or a run's --out folder"
    given, rest = the_word(argv, prog, "MODEL", what)
    owners = (ChatSettings, Writing, Sampling(temperature=0.8, top_p=0.95), Opening)
    toml = common.from_
    s, writing, sampling, opening = settings_from(rest, *owners, prog=prog, words="MODEL", toml=toml)
    prepare_process(opening.threads)
    typed = sys.stdin.isatty()
    opened = open_text_model(given, opening)
    own = {"system": s.system, "template": s.template, "interruptible": typed}
    chat = Chat(opened, sampling=sampling, writing=writing, **own)
    show, tell = shown_live(stdout, common.json)
    lines = typed_lines(sys.stdin, sys.stderr) if typed else sys.stdin
    turns, full = talk(chat, lines, show, tell, interactive=typed)
    data = {"model": given, "system": s.system, "turns": [dataclasses.asdict(turn) for turn in turns]}
    return Outcome(data, "", fail(full, 2) if full else 0)
