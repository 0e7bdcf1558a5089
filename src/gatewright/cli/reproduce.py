"""`gatewright reproduce PAPER/TABLE`: rebuild a recorded result; without a name, list what there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .run import Common, Outcome, command, prepare_process


@dataclass(frozen=True)
class ReproduceSettings:
    """How much, and where to."""

    quick: bool = False
    """minutes instead of the full form; written beside it as NAME-quick"""
    out: Path = Path("reproductions")
    """folder of the result: JSON, page and pictures"""
    work: Path | None = None
    """folder of runs and checkpoints; none is runs/reproduce/NAME; a stopped reproduction goes on there"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""


def main(argv: list[str]) -> int:
    """Run the command."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Reproduce one result, or return the list."""
    from .parse import settings_from, take_words

    words, rest = take_words(argv, most=1)
    prog = "gatewright reproduce"
    (s,) = settings_from(rest, ReproduceSettings, prog=prog, words="[PAPER/TABLE]", toml=common.from_)
    from ..experiments.registry import TARGETS, reproduce

    if not words:
        rows = [f"{name}\n      {target.about}" for name, target in TARGETS.items()]
        return Outcome({"targets": {name: t.about for name, t in TARGETS.items()}}, "\n".join(rows))
    prepare_process(s.threads)
    found = reproduce(words[0], s.quick, s.out, s.work)
    return Outcome(found.to_dict(), found.to_text())
