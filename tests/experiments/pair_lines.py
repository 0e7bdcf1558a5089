"""Numbers in words, in three languages, as a table of lines."""

from __future__ import annotations

from pathlib import Path

WORDS = {
    "en": "one two three four five six seven eight nine ten".split(),
    "fr": "un deux trois quatre cinq sixte sept huit neuf dix".split(),
    "sv": "ett två tre fyra fem sex sju åtta nio tio".split(),
}


def write_table(path: Path, languages: tuple[str, ...] = ("en", "fr")) -> Path:
    """Write a hundred lines of two words, every seventh of the last language missing."""
    rows = ["\t".join(languages)]
    for i in range(10):
        for j in range(10):
            cells = [f"{WORDS[name][i]} {WORDS[name][j]}" for name in languages]
            if (10 * i + j) % 7 == 6:
                cells[-1] = ""
            rows.append("\t".join(cells))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
