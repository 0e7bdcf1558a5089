"""Write README's table of papers from the registry; --check only compares."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gatewright.papers import all_papers

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- papers -->\n).*?(<!-- /papers -->)", re.DOTALL)


def table(root: Path = ROOT) -> str:
    """Return the lineage as a Markdown table; an id links to its page where the page exists."""
    lines = ["| year | id | what it added | here |", "|--:|---|---|---|"]
    for paper in all_papers():
        name = f"[`{paper.id}`]({paper.page})" if (root / paper.page).is_file() else f"`{paper.id}`"
        lines.append(f"| {paper.year} | {name} | {paper.added} | {paper.status} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str], root: Path = ROOT) -> int:
    """Rewrite the table, or with --check return 1 when it differs."""
    page = root / "README.md"
    text = page.read_text(encoding="utf-8")
    new = BLOCK.sub(lambda match: f"{match[1]}{table(root)}{match[2]}", text)
    if "--check" not in argv:
        page.write_text(new, encoding="utf-8")
        return 0
    if new != text:
        print("README.md's papers differ from the registry; run `make docs`", file=sys.stderr)
    return int(new != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
