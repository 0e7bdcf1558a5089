"""`gatewright papers [ID]`: the lineage of Mixture-of-Experts, or one paper's record."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import TYPE_CHECKING

from .run import Common, Outcome, command

if TYPE_CHECKING:
    from ..papers import PaperInfo


def main(argv: list[str]) -> int:
    """Run the command."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Return the whole lineage, or one paper."""
    from ..papers import all_papers, paper_info
    from .parse import settings_from, take_words

    words, rest = take_words(argv, most=1)
    settings_from(rest, prog="gatewright papers", words="[ID]", toml=common.from_)
    papers = (paper_info(words[0]),) if words else all_papers()
    records = [{**dataclasses.asdict(paper), "page": paper.page} for paper in papers]
    entries = [_entry(paper, most=len(paper.authors) if words else 8) for paper in papers]
    return Outcome({"papers": records}, "\n".join([*entries, *([] if words else [_wired(papers)])]))


def _entry(paper: PaperInfo, most: int) -> str:
    """Return one paper as a short paragraph, with at most `most` authors by name."""
    authors = list(paper.authors)
    if len(authors) > most:
        authors = [*authors[:3], f"and {len(authors) - 3} more (gatewright papers {paper.id})"]
    head = f"{paper.year}  {paper.id} ({paper.status})  {paper.title}"
    body = [f"{', '.join(authors)}. {paper.venue}.", f"Added: {paper.added}", f"Page: {paper.page}"]
    wrapped = [textwrap.fill(line, 100, initial_indent=" " * 6, subsequent_indent=" " * 6) for line in body]
    return "\n".join([head, *wrapped, ""])


def _wired(papers: tuple[PaperInfo, ...]) -> str:
    wired = [paper for paper in papers if paper.status == "wired"]
    ids = [paper.id for paper in wired if paper.trains_on == "text"]
    return f"{len(papers)} papers; {len(wired)} wired, on text: gatewright race {' | '.join(ids)}"
