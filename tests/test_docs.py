"""What README and docs say is so: code runs, links lead somewhere, figures are the recorded ones."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

from gatewright.cli import COMMANDS
from scripts import figures, roster, tree
from tests.markdown import blocks, local_links

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def run_blocks(text: str, name: str) -> dict[str, Any]:
    """Run a page's Python blocks one after another: plain ones as they stand, pycon ones as doctests."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(text), 1):
        if block.language == "python":
            exec(compile(block.code, f"{name}, block {number}", "exec"), space)
        elif block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.code, space, f"{name}, block {number}", name, 0)
            runner = doctest.DocTestRunner(verbose=False)
            runner.run(test, clear_globs=False)
            assert runner.failures == 0, f"{test.name} prints something else"
            space.update(test.globs)
    return space


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_code_on_a_page_runs(page: Path):
    run_blocks(page.read_text(encoding="utf-8"), page.name)


def test_readme_runs_and_trains_the_gate_under_its_heading():
    text = README.read_text(encoding="utf-8")
    found = [block.language for block in blocks(text) if block.heading == "Where the gate is trained"]
    assert found == ["python", "pycon"]
    model = run_blocks(text, "README.md")["model"]
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_a_page_whose_code_prints_something_else_fails():
    with pytest.raises(AssertionError, match="prints something else"):
        run_blocks("```pycon\n>>> 1 + 1\n3\n```\n", "toy")


def test_a_page_whose_code_breaks_fails():
    with pytest.raises(NameError):
        run_blocks("```python\nx = missing\n```\n", "toy")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path):
    targets = local_links(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_figures_are_the_recorded_ones(capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().err


def test_the_tree_is_the_one_that_exists(capsys):
    assert tree.main(["--check"]) == 0, capsys.readouterr().err


def test_the_papers_are_those_of_the_registry(capsys):
    assert roster.main(["--check"]) == 0, capsys.readouterr().err


def commands_named(text: str) -> set[str]:
    """Return every X of "gatewright X" in inline code and in shell blocks."""
    shell = "\n".join(block.code for block in blocks(text) if block.language == "sh")
    inline = re.findall(r"`(gatewright [^`]+)`", text)
    return set(re.findall(r"^gatewright ([a-z]+)", "\n".join([shell, *inline]), re.MULTILINE))


def test_pages_name_only_commands_and_targets_that_exist():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {"race", "plan", "doctor"} <= commands_named(text) <= set(COMMANDS)
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= rules
    assert commands_named("`gatewright fly` and\n```sh\ngatewright swim\n```\n") == {"fly", "swim"}


def test_the_changelog_knows_the_version():
    from gatewright import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
