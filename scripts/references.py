"""Write the line numbers that pages give as "`symbol` at `file.py:line`"; --check only compares.

A symbol is the name of a function or class, or a piece of the line meant, found in one line of the file only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The gap between symbol and place may be a line break.
MARK = re.compile(r"`(?P<name>[^`]+)`(?P<gap>\s+at\s+)`(?P<file>[\w./]+\.py):\d+`")


def locate(file: str, symbol: str, root: Path = ROOT) -> tuple[int, str]:
    """Return (line of the symbol, "") or (0, what is wrong); `file` is below package or repository."""
    path = next((p for p in (root / "src" / "gatewright" / file, root / file) if p.is_file()), None)
    if path is None:
        return 0, f"{file} is not there"
    lines = path.read_text(encoding="utf-8").splitlines()
    definition = re.compile(rf"\s*(?:def|class) {re.escape(symbol)}\b")
    found = [n for n, line in enumerate(lines, 1) if definition.match(line)]
    found = found or [n for n, line in enumerate(lines, 1) if symbol in line]
    if len(found) == 1:
        return found[0], ""
    return 0, f"{symbol!r} stands in {len(found)} lines of {file}"


def refresh(text: str, root: Path = ROOT) -> tuple[str, list[str]]:
    """Return the page with current line numbers, and what is wrong with it: references that lead nowhere."""
    wrong = []

    def current(match: re.Match[str]) -> str:
        line, reason = locate(match["file"], match["name"], root)
        if reason:
            wrong.append(reason)
            return match[0]
        return f"`{match['name']}`{match['gap']}`{match['file']}:{line}`"

    return MARK.sub(current, text), wrong


def main(argv: list[str], root: Path = ROOT) -> int:
    """Rewrite the pages below docs/; return 1 when a reference leads nowhere or, with --check, differs."""
    bad = False
    for page in sorted((root / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        new, wrong = refresh(text, root)
        for reason in wrong:
            print(f"{page.relative_to(root)}: {reason}", file=sys.stderr)
        if "--check" not in argv:
            page.write_text(new, encoding="utf-8")
        elif new != text:
            print(
                f"{page.relative_to(root)}: line numbers have moved; run `python scripts/references.py`",
                file=sys.stderr,
            )
            bad = True
        bad = bad or bool(wrong)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
