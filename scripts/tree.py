"""Write README's tree, one line per file that exists, from each file's own first line.

With --check it only compares.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- tree -->\n).*?(<!-- /tree -->)", re.DOTALL)
# Folders shown file by file, and folders shown as one line.
OPEN = ("src/gatewright", "scripts")
CLOSED = {
    "tests": "one folder per room; oracle/ is the slow definition; planted/ holds faults to catch",
    "docs": "one page per paper, guides, design.md",
    "reproductions": "recorded results: JSON, figures, and what did not match",
    "requirements": "pins of the packages that the default corpus, the cases and SmolLM2 are read from",
}
# Files that are sent out whole and so carry no comment of their own.
SAID_HERE = {
    "report.html": "The page that the report fills in",
    "report.css": "Its look, on a laptop and on a phone",
    "tokens.js": "Choosing the layer whose experts colour the tokens",
}
SUFFIXES = (".py", ".css", ".js", ".html", ".cpp", ".h")
MOST = 96


def summary(path: Path) -> str:
    """Return what a file says of itself: the first sentence of its docstring or opening comment."""
    if path.name in SAID_HERE:
        return SAID_HERE[path.name]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        told = ast.get_docstring(ast.parse(text)) or ""
    else:
        match = re.match(r"\s*(?:/\*+|<!--|//)\s*(.*?)\s*(?:\*/|-->|\n)", text, re.DOTALL)
        told = match[1] if match else ""
    line = " ".join(told.partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.;])(?<!et al\.)\s", line)[0].rstrip(".;")
    while len(sentence) > MOST:
        # Give up the last clause; a sentence of one clause loses words instead.
        shorter = re.sub(r"[,:(][^,:(]*$", "", sentence)
        sentence = (
            shorter.rstrip()
            if shorter not in ("", sentence)
            else f"{sentence[: MOST - 2].rsplit(' ', 1)[0]} …"
        )
    return sentence


def branch(folder: Path, depth: int) -> list[str]:
    """Return a folder's lines: files first, then folders, each with its own line."""
    inside = [path for path in sorted(folder.iterdir()) if path.name not in ("__pycache__", "__init__.py")]
    lines = []
    for path in [*(p for p in inside if p.is_file()), *(p for p in inside if p.is_dir())]:
        if path.is_dir():
            about = path / "__init__.py"
            below = branch(path, depth + 1)
            if below:
                lines += [_line(f"{path.name}/", summary(about) if about.is_file() else "", depth), *below]
        elif path.suffix in SUFFIXES:
            lines.append(_line(path.name, summary(path), depth))
    return lines


def _line(name: str, told: str, depth: int) -> str:
    return f"{'  ' * depth}{name:<{30 - 2 * depth}}{told}".rstrip()


def tree(root: Path) -> str:
    """Return the whole tree as a fenced block."""
    lines = []
    for name in OPEN:
        if (root / name).is_dir():
            about = root / name / "__init__.py"
            lines += [
                _line(f"{name}/", summary(about) if about.is_file() else "", 0),
                *branch(root / name, 1),
            ]
    lines += [_line(f"{name}/", told, 0) for name, told in CLOSED.items() if (root / name).is_dir()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def silent(root: Path) -> list[str]:
    """Return the files that say nothing of themselves."""
    files = [path for name in OPEN for path in sorted((root / name).rglob("*")) if path.suffix in SUFFIXES]
    return [str(path.relative_to(root)) for path in files if path.name != "__init__.py" and not summary(path)]


def main(argv: list[str], root: Path = ROOT) -> int:
    """Rewrite README.md's tree, or with --check return 1 when it differs or a file is silent."""
    page = root / "README.md"
    text = page.read_text(encoding="utf-8")
    new = BLOCK.sub(lambda match: f"{match[1]}{tree(root)}{match[2]}", text)
    missing = silent(root)
    if missing:
        print(
            f"no first line in {', '.join(missing)}; give each file a docstring or comment", file=sys.stderr
        )
        return 1
    if "--check" not in argv:
        page.write_text(new, encoding="utf-8")
        return 0
    if new != text:
        print("README.md's tree differs from the files; run `make docs`", file=sys.stderr)
    return int(new != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
