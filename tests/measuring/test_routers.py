"""Every router is timed against plain token choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gatewright.errors import UserError
from gatewright.measuring import RoutersRun, bench_routers, routers
from gatewright.parts import all_routers, router_info


def test_a_router_keeps_every_round_of_both_sides():
    row = routers.time_router(router_info("deepseek_v3"), 11, tokens=64)
    assert [len(row["seconds"][side]) for side in ("plain", "own")] == [11, 11]
    assert row["low"] <= row["ratio"] <= row["high"]


@pytest.mark.parametrize("whole", [False, True])
def test_every_router_is_timed(tmp_path: Path, monkeypatch, whole: bool):
    timed: list[tuple[str, int]] = []

    def fake(info, rounds, whole_layer, at_start):
        assert whole_layer is whole
        timed.append((f"{info.name} at its start" if at_start else info.name, rounds))
        return {"router": info.name, "ratio": 1.25, "low": 1.2, "high": 1.3}

    monkeypatch.setattr(routers, "time_router", fake)
    lines: list[str] = []
    result = bench_routers(RoutersRun(whole, rounds=11, out=str(tmp_path)), lines.append)
    # A layer that computes all of its experts is not the router's to answer for.
    expected = [i.name for i in all_routers() if i.name != "dense" or not whole]
    expected.insert(expected.index("remoe") + 1, "remoe at its start")
    assert [name for name, _ in timed] == expected
    # The optimal assignment takes seconds: once is enough to say so.
    assert {name for name, rounds in timed if rounds < 11} == {"base"}
    record = json.loads((tmp_path / "routers.json").read_text())
    assert record["schema"] == "gatewright.bench.routers.v1"
    assert len(record["rows"]) == len(timed) == len(lines)
    assert record["settings"]["whole_layer"] is whole
    assert result.to_text().startswith("whole layer" if whole else "router alone")
    assert result.to_text().count("1.25  (1.20 to 1.30)") == len(timed)
    assert result.to_dict()["files"] == [str(tmp_path / "routers.json")]


@pytest.mark.parametrize("name", ["switch", "hierarchical", "expert_choice", "mixture_of_depths", "hash"])
def test_a_whole_layer_is_timed_forward_and_backward(name: str):
    row = routers.time_router(router_info(name), 11, tokens=64, whole_layer=True)
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert len(row["seconds"]["own"]) == 11


def test_remoe_is_timed_with_k_experts_per_token_and_as_it_begins():
    for at_start, most in ((False, 2.0), (True, 32.0)):
        layer, x, ids, key = routers._layer("remoe", 256, 2, 4, at_start)
        record = layer(x, key=key, token_ids=ids)[1]["router"]
        per_token = float(record.counts.sum() / record.tokens)
        assert per_token == pytest.approx(most, rel=0.1)
    row = routers.time_router(router_info("remoe"), 11, tokens=64, at_start=True)
    assert row["router"] == "remoe at its start"


def test_few_rounds_are_refused():
    with pytest.raises(UserError, match="rounds 3"):
        RoutersRun(rounds=3)
