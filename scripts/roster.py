"""Write README's table of papers and the table of routers from their registries; --check only compares."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

from gatewright.papers import all_papers
from gatewright.parts import RouterInfo, all_routers

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- papers -->\n).*?(<!-- /papers -->)", re.DOTALL)
ROUTERS = re.compile(r"(<!-- routers -->\n).*?(<!-- /routers -->)", re.DOTALL)


def table(root: Path = ROOT) -> str:
    """Return the lineage as a Markdown table; an id links to its page where the page exists."""
    lines = ["| year | id | what it added | here |", "|--:|---|---|---|"]
    for paper in all_papers():
        name = f"[`{paper.id}`]({paper.page})" if (root / paper.page).is_file() else f"`{paper.id}`"
        lines.append(f"| {paper.year} | {name} | {paper.added} | {paper.status} |")
    return "\n".join(lines) + "\n"


def router_table() -> str:
    """Return every named router as a Markdown table."""
    lines = [
        "| router | scores | selects | weights | capacity | losses | causal | used by | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for info in all_routers():
        cells = [f"`{info.name}`", info.scores, info.selection, info.weights, info.capacity]
        cells += [", ".join(info.losses) or "none", _causal(info), info.used_by, info.source]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _causal(info: RouterInfo) -> str:
    if info.causal == info.causal_at_inference:
        return "yes" if info.causal else "no"
    return "in evaluation" if info.causal_at_inference else "in training"


def _between(new: str, match: re.Match[str]) -> str:
    return f"{match[1]}{new}{match[2]}"


def main(argv: list[str], root: Path = ROOT) -> int:
    """Rewrite the tables, or with --check return 1 when one differs."""
    pages = [
        ("README.md", BLOCK, table(root), "papers"),
        ("docs/routers.md", ROUTERS, router_table(), "routers"),
    ]
    wrong = 0
    for name, block, new, what in pages:
        page = root / name
        if not page.is_file():
            continue
        text = page.read_text(encoding="utf-8")
        filled = block.sub(partial(_between, new), text)
        if "--check" not in argv:
            page.write_text(filled, encoding="utf-8")
        elif filled != text:
            print(f"{name}'s {what} differ from the registry; run `make docs`", file=sys.stderr)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
