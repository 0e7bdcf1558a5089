"""Recorded results of 1991, 2013 and 2017: whole, expected beforehand, verdict and page their own."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gatewright.experiments import (
    deep_figures,
    deep_pages,
    deep_table1,
    deep_table2,
    gated,
    gated_experts,
    gated_pages,
    gated_tables,
    interference,
)

ROOT = Path(__file__).resolve().parents[1] / "reproductions"
Record = dict[str, Any]


def of_sizes(verdict: Callable[[Record], Record]) -> Callable[[Record], Record]:
    return lambda record: verdict(record["sizes"])


# Of each: the plan as the code has it, how the verdict follows, and the page.
RESULTS: dict[str, tuple[Any, Callable[[Record], Record], Callable[[Record], str]]] = {
    "local_experts/interference": (
        dataclasses.asdict(interference.PLAN),
        interference.verdict,
        interference.interference_page,
    ),
    "deep_moe/collapse": (
        dataclasses.asdict(deep_figures.PLAN),
        deep_figures.collapse_verdict,
        deep_pages.collapse_page,
    ),
    "deep_moe/table1": (
        dataclasses.asdict(deep_table1.PLAN),
        of_sizes(deep_table1.verdict),
        deep_pages.table1_page,
    ),
    "deep_moe/table2": (
        dataclasses.asdict(deep_table2.PLAN),
        of_sizes(deep_table2.verdict),
        deep_pages.table2_page,
    ),
    "sparsely_gated/table6": (
        gated.shared(gated_tables.TABLE6),
        gated_tables.verdict6,
        gated_pages.table6_page,
    ),
    "sparsely_gated/table9": (
        gated.shared(gated_experts.PLAN),
        gated_experts.verdict9,
        gated_pages.table9_page,
    ),
}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("target", RESULTS)
def test_a_result_is_recorded_in_full_and_its_page_and_verdict_follow(target: str) -> None:
    plan, verdict, page = RESULTS[target]
    paper, table = target.split("/")
    record = json.loads((ROOT / f"{paper}-{table}.json").read_text(encoding="utf-8"))
    assert record["target"] == target
    assert not record["quick"]
    assert record["plan"] == plain(plan)
    assert plain(verdict(record)) == record["verdict"]
    assert page(record) == (ROOT / f"{paper}-{table}.md").read_text(encoding="utf-8")
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    assert set(expected[paper][table]) == {"metric", "sign", "least_effect"}
