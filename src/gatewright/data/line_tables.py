"""A table of the same lines in several languages: one file, a language per column."""

from __future__ import annotations

from pathlib import Path

from gatewright.errors import UserError

Texts = dict[str, list[str]]
_FORM = "a UTF-8 file of tab-separated columns: languages in line 1 (en<TAB>fr), then a line per text"


def read_table(path: Path) -> Texts:
    """Return the lines of a table by language, as many of each; an empty cell is a translation that is
    missing.

    Raises: UserError, with the place, for a file that is no such table.
    """
    try:
        rows = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is not there; give {_FORM}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); give {_FORM}") from None
    languages = _cells(rows[0])
    if len(languages) < 2 or len(set(languages)) != len(languages) or not all(languages):
        told = ", ".join(map(repr, languages))
        raise UserError(f"{path}, line 1: languages {told}; allowed: two or more, each once; give {_FORM}")
    lines: Texts = {language: [] for language in languages}
    for number, row in enumerate(rows[1:], start=2):
        if not row.strip():
            continue
        cells = _cells(row)
        if len(cells) != len(languages):
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns; allowed: {len(languages)}, as line 1 has "
                "languages; leave a cell empty where a translation is missing"
            )
        for language, cell in zip(languages, cells, strict=True):
            lines[language].append(cell)
    return lines


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.rstrip("\r").split("\t")]
