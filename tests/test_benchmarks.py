"""The benchmark compares like with like, keeps raw times, and refuses to print noise."""

from __future__ import annotations

import pytest
import torch

from benchmarks import layer, routers
from gatewright.errors import RunFailure, UserError
from gatewright.parts import all_routers, router_info

TINY = layer.Shape(tokens=32, width=8, expert_width=6, num_experts=4, num_selected=2)


def test_the_dense_side_has_the_sparse_side_s_flops():
    # Three matmuls of D x F per expert, K of them, and a router of D x E: the dense layer absorbs all of it.
    for shape in (*layer.GRIDS["small"], *layer.GRIDS["wide"]):
        sparse = 3 * shape.num_selected * shape.expert_width + shape.num_experts
        assert abs(3 * layer.dense_width(shape) / sparse - 1) < 0.01, shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_keeps_every_round_of_both_sides(dtype: torch.dtype):
    row = layer.time_pair(TINY, dtype, 11)
    assert [len(row["seconds"][side]) for side in ("sparse", "dense")] == [11, 11]
    assert row["low"] <= row["ratio"] <= row["high"]


def test_few_rounds_are_refused():
    with pytest.raises(UserError, match="rounds 10"):
        layer.run_grid("small", 10, lambda line: None)


def test_a_noisy_dense_side_is_not_printed(monkeypatch):
    row = {"dtype": "float32", "ratio": 1.234, "low": 1.1, "high": 1.3, "dense_spread": 0.2}
    monkeypatch.setattr(layer, "GRIDS", {"tiny": (TINY,)})
    monkeypatch.setattr(layer, "time_pair", lambda *_: row)
    lines: list[str] = []
    assert len(layer.run_grid("tiny", 11, lines.append)["rows"]) == 2
    assert "1.23" in lines[-1]
    monkeypatch.setattr(layer, "time_pair", lambda *_: {**row, "dense_spread": 0.3})
    with pytest.raises(RunFailure, match="too busy"):
        layer.run_grid("tiny", 11, lines.append)
    assert "not printed" in lines[-1]
    assert "1.23" not in lines[-1]


def test_every_router_is_timed_against_plain_token_choice(monkeypatch):
    row = routers.time_router(router_info("deepseek_v3"), 11, tokens=64)
    assert [len(row["seconds"][side]) for side in ("plain", "own")] == [11, 11]
    assert row["low"] <= row["ratio"] <= row["high"]
    timed: list[tuple[str, int]] = []

    def fake(info, rounds):
        timed.append((info.name, rounds))
        return {"router": info.name, "ratio": 1.25, "low": 1.2, "high": 1.3}

    monkeypatch.setattr(routers, "time_router", fake)
    lines: list[str] = []
    record = routers.run_routers(11, lines.append)
    assert [name for name, _ in timed] == [info.name for info in all_routers()]
    # The optimal assignment takes seconds: once is enough to say so.
    assert {name for name, rounds in timed if rounds < 11} == {"base"}
    assert len(record["rows"]) == len(timed)
    assert "1.25" in lines[-1]
    with pytest.raises(UserError, match="rounds 3"):
        routers.run_routers(3, lines.append)
