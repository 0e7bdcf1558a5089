"""The page: what it says, what it must never do, and that no absent part stops it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gatewright.errors import RunFailure, UserError
from gatewright.inspection import render_page, write_report
from gatewright.inspection.plots import theme
from tests.inspection import sample
from tests.inspection.page import check, plain


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every optional part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theme, "DOTS", 60)
        return write_report(sample.full_race(routers=2), tmp_path_factory.mktemp("report"))


def test_the_page_needs_no_other_file_and_no_network(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    found = check(html)
    for reference in found.references:
        assert reference.startswith(("data:image/png;base64,", "#")), reference[:80]
    for link in found.references:
        if link.startswith("#"):
            assert link[1:] in found.identities
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+|http-equiv", "", html)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", html)
    assert 'name="viewport"' in html
    assert "default-src 'none'" in html
    assert len(found.identities) == len(set(found.identities))


def test_every_image_is_inlined_described_and_beside_the_page(written: Path) -> None:
    found = check(written.read_text(encoding="utf-8"))
    files = sorted(written.parent.glob("*.png"))
    assert len(found.images) == len(files) >= 14
    assert all(len(image["alt"] or "") > 30 for image in found.images)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    names = {path.stem for path in files}
    assert {"curve_tokens", "curve_train_flops", "curve_seconds", "domains", "scaling", "triangle"} <= names
    assert not list(written.parent.glob(".*"))


def test_the_full_page_says_what_was_measured(written: Path) -> None:
    words = plain(written.read_text(encoding="utf-8"))
    assert "annealed on 80 % of the tokens, ended at 1.9120" in words
    assert "Sparse is better by 0.0210 on average, more than the spread of 0.0040 over 3 seeds" in words
    assert "chance 6.2 %" in words
    assert "gatewright race olmoe --seeds 3" in words
    assert "As good as dense at equal size 1.909 against 1.871 ✗ Not held" in words
    assert "step takes 1.69× the time of a dense step (from 1.52× to 1.90×)" in words
    assert "by measured seconds 0.78×" in words
    for part in ("Load over training", "Dropped tokens", "Where each token went", "Small data"):
        assert part in words


@pytest.mark.usefixtures("undrawn")
def test_a_lost_race_reads_as_a_lost_race() -> None:
    html, _ = render_page(sample.race(-0.017))
    words = plain(html)
    assert 'class="verdict lost"' in html
    assert "✗ Not held" in words
    assert "✓ Held" not in words
    assert "Sparse is worse by 0.0170 on average" in words
    assert "by tokens never; by training FLOPs never; by measured seconds never" in words
    assert "better by" not in words


@pytest.mark.usefixtures("undrawn")
def test_a_gap_within_the_spread_is_not_called_a_win() -> None:
    words = plain(render_page(sample.race(0.001))[0])
    assert "✗ Not held" in words
    assert "which is no more than the spread of 0.0040" in words


@pytest.mark.usefixtures("undrawn")
def test_a_verdict_that_contradicts_its_gap_is_pointed_out() -> None:
    result = sample.race(-0.017)
    result["verdict"]["held"] = True
    assert "its mean gap is negative: trust the gap" in plain(render_page(result)[0])


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_race_is_no_verdict() -> None:
    result = sample.race()
    assert "Stopped before the end" not in render_page(result)[0]
    result["runs"][2]["sides"][1]["final"]["tokens"] = 3_000_000
    words = plain(render_page(result)[0])
    assert (
        "Stopped before the end, so this is no verdict yet: dense, seed 2: 3.00 M of 6.00 M tokens." in words
    )


@pytest.mark.usefixtures("undrawn")
def test_one_seed_has_no_spread() -> None:
    result = sample.race(seeds=1)
    result["verdict"] = None
    words = plain(render_page(result)[0])
    assert "One seed: the spread over seeds is not recorded" in words
    assert "✓ Held" in words


@pytest.mark.usefixtures("undrawn")
def test_every_text_of_the_result_is_escaped() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"

    def poison(node: Any) -> Any:
        if isinstance(node, dict):
            return {evil + key if key in poisoned else key: poison(value) for key, value in node.items()}
        if isinstance(node, list):
            return [poison(value) for value in node]
        return evil + node if isinstance(node, str) and node not in kept else node

    poisoned = {"layers.0", "scripture", "width", "torch"}
    kept = {"gatewright.race.v1", "sparse", "dense", "active"}
    html, _ = render_page(poison(sample.full_race()))
    found = check(html)
    assert found.scripts == 2  # the page's own and the one JSON block
    assert "<img src=x" not in html
    assert html.count("</script>") == 2
    assert "onerror=alert(2)" in html  # it is shown, as text


@pytest.mark.usefixtures("coarse")
def test_a_training_run_has_its_own_headline(tmp_path: Path) -> None:
    page = write_report(sample.training(routers=1), tmp_path / "new" / "folder")
    words = plain(page.read_text(encoding="utf-8"))
    assert "ended at 1.9090 bits per byte after 4.80 M tokens and 2 min 10 s" in words
    assert "Held" not in words
    assert "dense twin" not in words
    assert "Where each token went" in words


@pytest.mark.usefixtures("undrawn")
def test_several_sparse_sides_each_have_their_routing() -> None:
    result = sample.race(seeds=1)
    more = sample.side("sparse-16", "sparse", 1.95, experts=16, length=30)
    result["runs"][0]["sides"].append(more)
    html, _ = render_page(result)
    found = check(html)
    assert {"tokens-sparse", "tokens-sparse-16"} <= set(found.identities)
    assert html.count("<summary>sparse-16 (sparse)</summary>") == 1


@pytest.mark.usefixtures("coarse")
def test_nothing_of_the_callers_matplotlib_changes() -> None:
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    render_page(sample.race(seeds=1, routers=1, length=12))
    assert dict(matplotlib.rcParams) == before
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []


def test_import_is_light() -> None:
    code = (
        "import sys, gatewright.inspection; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_foreign_result_and_an_unwritable_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"result schema 'gatewright.race.v2'; allowed are"):
        render_page({"schema": "gatewright.race.v2"})
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunFailure, match="cannot create"):
        write_report({"schema": "gatewright.train.v1"}, blocked)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunFailure, match="cannot write"):
        write_report({"schema": "gatewright.train.v1"}, tmp_path)
    assert not list(tmp_path.glob(".*"))
