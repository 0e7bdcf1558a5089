"""The papers' pages say what is so: line numbers lead to symbols, deviations and sizes are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gatewright.papers import all_papers, get_paper, wired_papers
from gatewright.papers.registry import FORMS
from scripts import references

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def words(text: str) -> str:
    return " ".join(text.split())


def page_of(paper: str) -> str:
    return (ROOT / "docs" / "papers" / f"{paper}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_line_numbers_lead_to_their_symbols(page: Path):
    text = page.read_text(encoding="utf-8")
    new, wrong = references.refresh(text)
    assert wrong == []
    assert new == text, "line numbers have moved; run `python scripts/references.py`"
    # A line number that the check cannot read would rot unseen.
    assert len(re.findall(r"\.py:\d+", text)) == len(references.MARK.findall(text))


def test_the_checks_find_what_is_wrong(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text("x = 1\n\ndef f():\n    return x\n\nclass G:\n    pass\n")
    page = tmp_path / "docs" / "page.md"
    page.write_text("`f` at `code.py:1`, `G` at\n`code.py:6`, `x = 1` at `code.py:2`")
    assert references.main(["--check"], tmp_path) == 1
    assert references.main([], tmp_path) == 0
    assert page.read_text() == "`f` at `code.py:3`, `G` at\n`code.py:6`, `x = 1` at `code.py:1`"
    assert references.main(["--check"], tmp_path) == 0
    for broken in ("`h` at `code.py:1`", "`x` at `code.py:1`", "`f` at `gone.py:1`"):
        page.write_text(broken)
        assert references.main([], tmp_path) == 1
        assert page.read_text() == broken


@pytest.mark.parametrize("paper", wired_papers())
def test_a_wired_page_lists_every_deviation_and_size(paper: str):
    text, file = words(page_of(paper)), get_paper(paper)
    told = text.split("## Deviations")[1].split(" ## ")[0]
    # Another form of a paper stands on its page only where it says that it does.
    forms = [get_paper(form).DEVIATIONS for form, of in FORMS.items() if of == paper]
    whole = [sentences for sentences in forms if all(sentence in told for sentence in sentences)]
    expected = dict.fromkeys(sentence for own in (file.DEVIATIONS, *whole) for sentence in own)
    assert [sentence for sentence in expected if sentence not in told] == []
    assert told.count(" - ") == len(expected)
    assert [name for name in file.PUBLISHED if f"`{name}`" not in text] == []


@pytest.mark.parametrize("paper", all_papers(), ids=lambda paper: paper.id)
def test_a_page_names_all_authors_or_where_they_are(paper):
    text = words(page_of(paper.id))
    if "papers/authors.py" in text:
        assert f"{paper.authors[1]} and {len(paper.authors) - 2} others" in text
    else:
        assert [author for author in paper.authors if author not in text] == []


@pytest.mark.parametrize("paper", all_papers(), ids=lambda paper: paper.id)
def test_a_page_has_its_sections(paper):
    headings = re.findall(r"^## (.*)$", page_of(paper.id), re.MULTILINE)
    if paper.status == "planned":
        assert headings == ["What it adds", "Equations", "Published numbers", "Traps"]
    else:
        expected = [
            "Equations, and where they are",
            "Published numbers",
            "Reproduction",
            "Deviations",
            "Traps",
        ]
        assert headings == expected
