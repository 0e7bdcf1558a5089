"""`gatewright data [PATH...]`: a profile of the text that a run would train on."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .run import Common, Outcome, command


@dataclass(frozen=True)
class DataSettings:
    """How the text is read; the same words as of a run."""

    tokenizer: str = "bytes"
    """bytes, bpe:N (trained on this text), or a path to a tokenizer.json"""
    valid_bytes: int = 512_000
    """bytes of text to hold out, shared by the domains"""
    data_seed: int = 0
    """which documents are held out"""
    fetch: bool = False
    """fetch the pinned parallel text with npm into the cache instead, and say where it is"""


def main(argv: list[str]) -> int:
    """Run the command."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Profile files and folders, or the default corpus when none is given."""
    from ..data import profile_data
    from .parse import settings_from, take_words

    paths, rest = take_words(argv, most=len(argv))
    (s,) = settings_from(rest, DataSettings, prog="gatewright data", words="[PATH...]", toml=common.from_)
    if s.fetch:
        from ..data.parallel import PACKAGE, fetch

        place = str(fetch(progress=lambda line: print(line, file=sys.stderr, flush=True)))
        return Outcome({"package": PACKAGE, "folder": place}, place)
    found = profile_data(
        paths,
        tokenizer=s.tokenizer,
        valid_bytes=s.valid_bytes,
        seed=s.data_seed,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return Outcome(found.to_dict(), found.to_text())
