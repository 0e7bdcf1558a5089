"""`gatewright bench`: its words, its exit codes, and what it says to bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gatewright import measuring
from gatewright.cli import main
from gatewright.measuring import BenchResult, BenchRun
from gatewright.measuring.summary import summary
from tests.measuring.samples import MACHINE, TINY, row


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path: Path) -> list[BenchRun]:
    """Stand in for the measurement; return what was asked of it."""
    runs: list[BenchRun] = []

    def fake(run: BenchRun) -> BenchResult:
        runs.append(run)
        rows = [row(), row(TINY._replace(tokens=64), noise=0.9 * (run.rounds == 12))]
        record = {
            "environment": {"processor": "toy", "threads": 1, "torch": "2", "commit": "abc"},
            "settings": {
                **{"transformers": "5", "backend": "grouped", "allocator": run.allocator},
                **{"gradients": "given up", "rounds": run.rounds},
            },
            "machine": MACHINE.to_dict(),
            "rows": rows,
            **summary(rows),
        }
        return BenchResult(record, ("layer.json",))

    monkeypatch.setattr(measuring, "bench_layer", fake)
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)
    return runs


def test_layer_is_what_no_word_means(capsys, asked: list[BenchRun]):
    assert main(["bench", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["rows"]) == 2
    assert record["files"] == ["layer.json"]
    assert (
        main(["bench", "layer", "--rows", TINY.name, "8x8x8x2x1", "--dtypes", "bf16", "--quick=false"]) == 0
    )
    assert asked == [BenchRun(), BenchRun(rows=(TINY.name, "8x8x8x2x1"), dtypes=("bf16",))]
    out = capsys.readouterr().out
    assert "2.00 (2.00 to 2.00)" in out
    assert "not held fp32 forward-backward: geometric mean at most 1.25" in out
    assert "held     fp32 forward-backward: 1.6 times as fast" in out


def test_a_step_takes_a_paper_and_its_flags(capsys, monkeypatch):
    seen: list[measuring.StepRun] = []

    class Result:
        def check(self) -> None:
            """Quiet."""

        def to_dict(self) -> dict[str, str]:
            return {"a": "b"}

        def to_text(self) -> str:
            return "a table"

    def fake(run: measuring.StepRun) -> Result:
        seen.append(run)
        return Result()

    monkeypatch.setattr(measuring, "bench_step", fake)
    assert main(["bench", "step"]) == 0
    assert (
        main(["bench", "step", "switch", "--precisions", "bf16", "--num-experts", "8", "--rounds", "11"]) == 0
    )
    assert capsys.readouterr().out == "a table\na table\n"
    assert [(run.paper, run.precisions, run.rounds) for run in seen] == [
        ("mixtral", ("fp32", "bf16"), 15),
        ("switch", ("bf16",), 11),
    ]
    assert [run.model.num_experts for run in seen] == [64, 8]


def test_refused_rows_are_named_on_stderr_and_exit_with_1(capsys):
    assert main(["bench", "--rounds", "12"]) == 1
    out, err = capsys.readouterr()
    assert "2.00 (2.00 to 2.00)" in out
    assert err.count("gatewright: error: 1 of 2 rows refused") == 1
    assert "64x16x8x4x2 fp32 forward-backward" in err


def test_the_allocator_that_took_effect_is_recorded(capsys, monkeypatch, asked: list[BenchRun]):
    main(["bench", "--allocator", "default"])
    main(["bench"])
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: False)
    main(["bench"])
    assert [run.allocator for run in asked] == ["default", "kept", "default"]
    assert replace(asked[0], allocator="kept") == BenchRun()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("bench layr", ["bench layr", "did you mean 'layer'", "allowed: layer, decode, routers"]),
        ("bench --rounds 10", ["rounds 10", "11 or more"]),
        ("bench layer --rows 1x2x3", ["row '1x2x3'", "TxDxFxExK"]),
        ("bench --rows 8x8x8x2x3", ["at most as many selected"]),
        ("bench --dtypes fp16", ["fp16", "fp32 or bf16"]),
        ("bench --passes backward", ["backward", "forward or forward-backward"]),
        ("bench --allocator keep", ["kept or default"]),
        ("bench --backend grouper", ["did you mean 'grouped'"]),
        ("bench --threads -1", ["--threads -1"]),
        ("bench --quick --rows 8x8x8x2x1", ["--quick with --rows"]),
        ("bench routers --rounds 3", ["rounds 3"]),
        ("bench step --rounds 3", ["rounds 3", "11 or more"]),
        ("bench step mixtrall", ["mixtrall", "did you mean 'mixtral'"]),
        ("bench step --quick", ["--quick", "gatewright bench step mixtral --help"]),
        ("bench decode --heads 3", ["heads 3", "divide"]),
        ("bench decode --kinds decode-2", ["decode-2", "decode-1"]),
        ("bench routers --quick", ["--quick", "gatewright bench routers --help"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, asked, line: str, parts: list[str]):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines()), asked) == ("", 1, [])
    assert [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize("line", ["bench --help", "bench layer --help", "bench routers --help"])
def test_help_names_every_word(capsys, line: str):
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: gatewright bench ")
    assert [
        word for word in ("layer", "routers", "--rounds", "--allocator", "--json") if word not in out
    ] == []
