"""One file per milestone, and the registry that finds them; a paper file never imports another."""

from gatewright.papers.registry import (
    PaperInfo,
    all_papers,
    get_paper,
    get_text_paper,
    get_trained_paper,
    paper_info,
    published,
    published_names,
    text_papers,
    trained_papers,
    wired_papers,
)

__all__ = [
    "PaperInfo",
    "all_papers",
    "get_paper",
    "get_text_paper",
    "get_trained_paper",
    "paper_info",
    "published",
    "published_names",
    "text_papers",
    "trained_papers",
    "wired_papers",
]
