"""The scripts that keep the documentation true fill what they should, and notice a difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gatewright.parts import all_routers
from scripts import against, bench_figures, figures, planted, roster, tree

RACE = {
    "schema": "gatewright.race.v1",
    "command": "gatewright reproduce race/toy",
    "environment": {"processor": "toy", "threads": 2, "torch": "2.13.0", "commit": "abc"},
    "verdict": {"sentence": "The sparse model won.", "held": True},
    "runs": [
        {
            "seed": 0,
            "sides": [
                {
                    "label": "sparse, 64 experts",
                    "active_parameters": 123_456,
                    "total_parameters": 6_290_000,
                    "final": {"valid_bpb": 1.98768, "tokens": 6_144_000, "seconds": 90.0},
                }
            ],
        }
    ],
    "comparisons": [
        {
            **{"seed": 0, "sparse": "sparse", "dense": "dense", "gap_bpb": 0.0123},
            **{"token_share": 0.8, "flop_share": 0.81, "second_share": 1.5},
            "step_time_ratio": {"median": 1.875, "low": 1.8, "high": 2.0},
        }
    ],
}
PAGE = "Before.\n<!-- figures: race-toy -->\nold\n<!-- /figures -->\nAfter.\n"


def site(root: Path, record: dict | None) -> Path:
    """Write a README with one block, and its record."""
    (root / "README.md").write_text(PAGE)
    (root / "reproductions").mkdir()
    if record is not None:
        (root / "reproductions" / "race-toy.json").write_text(json.dumps(record))
    return root


def test_figures_come_from_the_record(tmp_path: Path):
    assert figures.main([], site(tmp_path, RACE)) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Before.\n<!-- figures: race-toy -->\nThe sparse model won.\n")
    assert text.endswith("<!-- /figures -->\nAfter.\n")
    assert "| 0 | sparse, 64 experts | 123k / 6.29M | 6.14M | 1.9877 | 1.5 min |" in text
    assert "0.0123 bits per byte better on 80 % of the tokens" in text
    assert "a step takes 1.88 (1.80 to 2.00) times as long" in text
    assert "reproductions/race-toy.json" in text
    assert figures.main([], tmp_path) == 0
    assert (tmp_path / "README.md").read_text() == text


def test_two_commits_are_compared_within_rounds():
    log = "\n".join(
        json.dumps({"kind": kind, "step": step, "step_seconds": took})
        for kind, step, took in (
            ("step", 10, 9.0),
            ("step", 30, 0.2),
            ("evaluation", 30, 5.0),
            ("step", 40, 0.4),
        )
    )
    assert against.step_seconds(log, warm=20) == pytest.approx(0.3)
    # Ratios 2, 3 and 2 within rounds; the medians alone, 0.4 over 0.2, would hide the second.
    turns = [(0.4, 0.2), (0.9, 0.3), (0.2, 0.1)]
    rounds = [
        {"there": dict.fromkeys(against.MODELS, a), "here": dict.fromkeys(against.MODELS, b)}
        for a, b in turns
    ]
    found = against.summary(rounds)
    assert {name: (own["ratio"], own["low"]) for name, own in found.items()} == {
        name: pytest.approx((2.0, 2.0)) for name in against.MODELS
    }
    assert found["dense"]["high"] == pytest.approx(3.0)
    place = {"processor": "toy", "threads": 2, "torch": "2.13.0", "commit": "abc"}
    record = {
        "there": "def",
        "models": found,
        "environment": place,
        "command": "run it",
        "settings": {"rounds": 3},
    }
    text = bench_figures.BLOCKS["against"](record, "toy.json")
    assert "a sparse step takes 200.0 ms and took 400.0 ms, 2.00 (2.00 to 3.00) times as long" in text


def test_a_figure_that_somebody_typed_is_noticed(tmp_path: Path, capsys):
    figures.main([], site(tmp_path, RACE))
    assert figures.main(["--check"], tmp_path) == 0
    page = tmp_path / "README.md"
    page.write_text(page.read_text().replace("1.9877", "1.8877"))
    assert figures.main(["--check"], tmp_path) == 1
    assert "README.md" in capsys.readouterr().err
    assert "1.8877" in page.read_text()


def test_a_result_that_is_not_recorded_is_said(tmp_path: Path):
    figures.main([], site(tmp_path, None))
    line = "Not recorded yet; `gatewright reproduce race/toy` gives it."
    assert line in (tmp_path / "README.md").read_text()


def test_a_record_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"race-toy\.json: no way to show"):
        figures.main([], site(tmp_path, {"schema": "other"}))


def grown(root: Path) -> Path:
    """Write a small source tree and a README for it."""
    files = {
        "README.md": "Top\n<!-- tree -->\n<!-- /tree -->\nEnd\n",
        "src/gatewright/__init__.py": '"""The whole."""',
        "src/gatewright/parts/__init__.py": '"""Mechanism; nothing else."""',
        "src/gatewright/parts/layer.py": '"""The layer. More words."""',
        "src/gatewright/parts/look.css": "/* The look */\nbody {}",
        "tests/test_a.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_tree_lists_each_file_with_its_first_sentence(tmp_path: Path):
    assert tree.main([], grown(tmp_path)) == 0
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert [" ".join(line.split()) for line in lines[3:7]] == [
        "src/gatewright/ The whole",
        "parts/ Mechanism",
        "layer.py The layer",
        "look.css The look",
    ]
    assert lines[7].startswith("tests/ ")
    assert (lines[0], lines[-1]) == ("Top", "End")


def test_a_new_file_makes_the_tree_stale_and_a_silent_one_is_named(tmp_path: Path, capsys):
    tree.main([], grown(tmp_path))
    assert tree.main(["--check"], tmp_path) == 0
    new = tmp_path / "src/gatewright/parts/new.py"
    new.write_text('"""New."""')
    assert tree.main(["--check"], tmp_path) == 1
    new.write_text("x = 1")
    assert tree.main([], tmp_path) == 1
    assert "no first line in src/gatewright/parts/new.py" in capsys.readouterr().err


def test_a_long_first_line_loses_its_last_clauses(tmp_path: Path):
    path = tmp_path / "a.py"
    path.write_text(f'"""Short start, {"word " * 20}, {"word " * 20}."""')
    assert tree.summary(path) == "Short start"
    path.write_text(f'"""{"word " * 40}."""')
    assert len(tree.summary(path)) <= tree.MOST
    path.write_text('"""Mixtral (Jiang et al. 2024). More."""')
    assert tree.summary(path) == "Mixtral (Jiang et al. 2024)"


CODE = "def double(x):\n    return 2 * x\n"
TEST = "from toy import double\n\ndef test_double():\n    assert double(3) == {}\n"
HUNK = "@@ -1,2 +1,2 @@\n def double(x):\n-    return 2 * x\n+    return {}\n"
DIFF = "--- a/src/toy.py\n+++ b/src/toy.py\n" + HUNK


def garden(root: Path, becomes: str, right: int = 6, test: str = "tests/test_toy.py::test_double") -> Path:
    """Write a toy project with one planted fault."""
    files = {
        "src/toy.py": CODE,
        "tests/test_toy.py": TEST.format(right),
        "tests/planted/toy.patch": f"Fault: it trebles.\nTest: {test}\n\n" + DIFF.format(becomes),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("becomes", "right", "code", "said"),
    [
        ("3 * x", 6, 0, "noticed  toy.patch: it trebles."),
        ("x + x", 6, 1, "not noticed"),
        ("3 * x", 7, 1, "do not pass without a fault"),
    ],
)
def test_a_planted_fault_has_to_be_noticed(
    tmp_path: Path, capfd, becomes: str, right: int, code: int, said: str
):
    assert planted.main([], garden(tmp_path, becomes, right)) == code
    out, err = capfd.readouterr()
    assert said in out + err
    assert (tmp_path / "src/toy.py").read_text() == CODE


def test_a_patch_without_its_header_or_its_place_is_named(tmp_path: Path, capfd):
    root = garden(tmp_path, "3 * x")
    patch = root / "tests/planted/toy.patch"
    (root / "src/toy.py").write_text("def double(y):\n    return y + y\n")
    assert planted.main([], root) == 1
    assert "does not apply" in capfd.readouterr().out
    patch.write_text("Fault: x\n\n" + DIFF)
    with pytest.raises(ValueError, match=r"toy\.patch: no line 'Test: \.\.\.'"):
        planted.main([], root)
    assert planted.main(["other"], root) == 2


ARMS = {
    "target": "toy/arms",
    "environment": RACE["environment"],
    "verdict": {"sentence": "held: the loss helps"},
    "arms": {
        "twin": {
            "causal": True,
            "seeds": [{"valid_bpb": 2.5}, {"valid_bpb": 2.4}],
            "step_time": {"median": 0.9},
        },
        "ahead": {
            "causal": False,
            "seeds": [
                {"valid_bpb": 2.25, "training": {"max_violation": 1.0, "dropped": 0.25}},
                {"valid_bpb": None, "training": {"max_violation": 2.0, "dropped": 0.75}},
            ],
            "step_time": {"median": 1.234},
        },
    },
}


def test_an_experiment_with_many_arms_shows_every_seed(tmp_path: Path):
    (tmp_path / "reproductions").mkdir()
    (tmp_path / "reproductions" / "toy-arms.json").write_text(json.dumps(ARMS))
    (tmp_path / "README.md").write_text(PAGE.replace("race-toy", "toy-arms"))
    assert figures.main([], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "held: the loss helps" in text
    assert "| twin | 2.5000, 2.4000 | - | - | 0.90 |" in text
    assert "| ahead (looks ahead) | 2.2500, diverged | 1.50 | 50.0 % | 1.23 |" in text
    assert "`gatewright reproduce toy/arms`" in text


def test_the_table_of_routers_comes_from_the_registry(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "routers.md"
    page.write_text("Before.\n<!-- routers -->\nold\n<!-- /routers -->\nAfter.\n")
    assert roster.main(["--check"], tmp_path) == 1
    assert roster.main([], tmp_path) == 0
    assert roster.main(["--check"], tmp_path) == 0
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(all_routers())
    (row,) = (line for line in rows if line.startswith("| `sinkhorn`"))
    assert "| in evaluation |" in row


def test_table_1_of_1991_is_shown_with_what_never_ended(tmp_path: Path):
    summary = {
        "epochs_mean": 693.6,
        "epochs_sd": None,
        "train_percent": 93.04,
        "test_percent": 92.5,
        "reached": 1,
    }
    systems = {
        "local-experts-4": {"rate": 0.05, "runs": {"epochs": [694, None]}, "summary": summary},
        "back-propagation-6": {"rate": None, "runs": None},
    }
    record = {
        **{key: RACE[key] for key in ("environment", "verdict")},
        **{"schema": "gatewright.table1.v1", "target": "race/toy", "readings": {"A": {"systems": systems}}},
    }
    assert figures.main([], site(tmp_path, record)) == 0
    text = (tmp_path / "README.md").read_text()
    assert "The sparse model won.." not in text
    assert "| A | local-experts-4 | 0.05 | 694 ± - | 93.0 | 92.5 | 1 of 2 |" in text
    assert "| A | back-propagation-6 | none | - | - | - | - |" in text
    assert "`gatewright reproduce race/toy` on toy, 2 threads" in text
