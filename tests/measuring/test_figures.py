"""The recorded grid is shown on its page, row by row, and a page without a record says how to get one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gatewright.inspection.plots import ratios
from gatewright.measuring.pictures import draw_pictures
from gatewright.measuring.result import SCHEMA
from gatewright.measuring.summary import summary
from scripts import figures
from tests.measuring.samples import MACHINE, TINY, row

PAGE = "Before.\n<!-- figures: bench-layer -->\nold\n<!-- /figures -->\nAfter.\n"
LEAN = {"ours": 3 << 20, "transformers_eager": None}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    rows = [
        row(few=1.6) | {"left_out": {"transformers_batched_mm": "copies too much"}, "memory": LEAN},
        row(TINY._replace(tokens=64), noise=0.5),
    ]
    place = {"processor": "toy", "threads": 2, "torch": "2.13.0", "commit": "abc"}
    how = {
        "transformers": None,
        "backend": "grouped",
        "allocator": "kept",
        "gradients": "given up",
        "rounds": 11,
    }
    told = {"schema": SCHEMA, "command": "gatewright bench layer", "environment": place, "settings": how}
    record = {**told, "machine": MACHINE.to_dict(), "rows": rows, **summary(rows)}
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "reproductions").mkdir()
    (tmp_path / "reproductions" / "bench-layer.json").write_text(json.dumps(record))
    return tmp_path


def test_the_page_holds_means_goals_and_every_row(site: Path):
    assert figures.main([], site) == 0
    text = (site / "README.md").read_text()
    lines = text.splitlines()
    assert "| fp32, forward-backward | 1 (1 refused) | 2.00 | 0.50 | 4.00 | 4.00 |" in lines
    assert (
        "- not held: fp32, forward-backward: no row above 1.5 times the best dense side: 2.00 in 48x16x8x4x2"
        in lines
    )
    cells = "2000.00 ms | 2.00 (2.00 to 2.00) | 0.50 (0.50 to 0.50) | 4.00 | 1.25 (1.25 to 1.25) of 8 |"
    assert f"| 48x16x8x4x2 | fp32, forward-backward | {cells}" in lines
    (refused,) = (line for line in lines if line.startswith("| 64x16x8x4x2"))
    assert "refused: the dense side alone spread by 50 %" in refused
    assert "2.00" not in refused
    assert "- left out: transformers_batched_mm: copies too much (48x16x8x4x2 fp32)" in lines
    assert "- peak memory 48x16x8x4x2 fp32: ours 3 MiB, transformers_eager died" in lines
    assert "transformers not installed" in text
    assert "reproductions/bench-layer.json" in text


def test_a_grid_that_is_not_recorded_is_said(site: Path):
    (site / "reproductions" / "bench-layer.json").unlink()
    figures.main([], site)
    assert "Not recorded yet; `gatewright bench layer` gives it." in (site / "README.md").read_text()


def test_pictures_show_the_rows_that_are_quiet(tmp_path: Path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "gatewright.measuring.pictures.draw_ratios",
        lambda lines, title, axis, path: drawn.append((lines, title)),
    )
    rows = [row(), row(TINY._replace(tokens=64), noise=0.5), row(theirs=None, kind="forward")]
    paths = draw_pictures(rows, tmp_path)
    assert [path.name for path in paths] == ["layer-fp32-forward-backward.png", "layer-fp32-forward.png"]
    both, forward = drawn
    assert both == (
        [("48x16x8x4x2", {"gatewright": (2.0, 2.0, 2.0), "transformers' best": (4.0, 4.0, 4.0)})],
        "forward and backward, fp32",
    )
    assert forward[0] == [("48x16x8x4x2", {"gatewright": (2.0, 2.0, 2.0)})]


def test_a_picture_of_ratios_is_a_png(tmp_path: Path):
    lines = [("one", {"a": (1.2, 1.1, 1.3), "b": (2.0, 1.9, 2.2)}), ("two", {"a": (0.9, 0.8, 1.0)})]
    ratios.draw_ratios(lines, "title", "axis", tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
