"""Pages show what was measured of steps and of decoding, and what was refused or left out."""

from __future__ import annotations

from typing import Any

from scripts import bench_figures

PLACE = {"processor": "toy", "threads": 2, "torch": "2", "commit": "abc"}


def ratio(value: float) -> dict[str, float]:
    return {"median": value, "low": value - 0.25, "high": value + 0.25}


def decoded(kind: str, refused: str | None = None, **changes: Any) -> dict[str, Any]:
    row = {
        "dtype": "bf16",
        "pass": kind,
        "refused": refused,
        "tokens_per_second": {
            name: ratio(speed)
            for name, speed in (
                ("ours", 50),
                ("ours_int8", 75),
                ("transformers_eager", 20),
                ("transformers_compiled", 25),
            )
        },
        "ratios": {"transformers": ratio(0.5)},
        "bandwidth_share": {"ours": ratio(0.75)},
        "left_out": {},
        "agreement": {"transformers_eager": {"rows": 8, "rows_equal": 8, "widest_lead_where_parted": 0.0}},
    }
    return {**row, **changes}


def test_decoding_shows_speeds_ratios_shares_and_where_ids_part():
    parted = {"ours_int8": {"rows": 8, "rows_equal": 6, "widest_lead_where_parted": 0.0125}}
    record = {
        "schema": "gatewright.bench.decode.v1",
        "command": "gatewright bench decode",
        "environment": PLACE,
        "settings": {"sizes": {"width": 8}, "transformers": "5", "allocator": "kept", "rounds": 11},
        "rows": [
            decoded("decode-8", agreement=parted),
            decoded("prefill", bandwidth_share={}, left_out={"transformers_compiled": "never compiled"}),
            decoded("decode-1", refused="busy"),
        ],
    }
    text = bench_figures.BLOCKS["decode"](record, "bench-decode.json")
    assert "| bf16, decode-8 | 50.0 | 75.0 | 25.0 | 0.50 (0.25 to 0.75) | 0.75 (0.50 to 1.00) |" in text
    assert "| bf16, prefill | 50.0 | 75.0 | 25.0 | 0.50 (0.25 to 0.75) | - |" in text
    assert "| bf16, decode-1 | refused: busy |" in text
    assert "- left out: transformers_compiled: never compiled (bf16 prefill)" in text
    assert (
        "- bf16 decode-8: the ids of ours_int8 part from ours in 2 of 8 texts, at a lead of at most 0.0125"
        in text
    )
    assert "ids of transformers_eager" not in text
    assert text.rstrip().endswith(
        "commit `abc`; every number is taken from `reproductions/bench-decode.json`."
    )


def test_a_step_shows_its_parts_and_goals():
    part = {"forward": 0.001, "backward": 0.002, "floor": 0.0015}
    record = {
        "command": "gatewright bench step",
        "environment": PLACE,
        "settings": {"allocator": "kept", "rounds": 11},
        "machine": {"copy_bytes": ratio(2e9)},
        "rows": [
            {
                "precision": "fp32",
                "step_seconds": {"dense": ratio(0.04), "sparse_plain": ratio(0.1)},
                "sides": {
                    "sparse": {"parts": {"shared_experts": part}},
                    "dense": {"parts": {"rest": {**part, "floor": None}}},
                },
            }
        ],
        "goals": [{"precision": "fp32", "goal": "fast", "shown": "1.2", "held": False}],
    }
    text = bench_figures.BLOCKS["step"](record, "bench-step.json")
    assert text.startswith("fp32: dense 40.0 ms, sparse plain 100.0 ms.")
    assert "| shared experts | 3.00 ms | 2.0 | - | - |" in text
    assert "| rest | - | - | 3.00 ms | - |" in text
    assert "- not held: fp32: fast: 1.2" in text
    assert "(copy_bytes 2.0 G/s)" in text
