"""Recorded results of 1991 to 2021 and of fine-tuning: whole, expected; their verdict and page follow."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
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
    distill_pages,
    distill_tables,
    finetune_pages,
    finetune_tables,
    gated,
    gated_experts,
    gated_pages,
    gated_tables,
    gshard_page,
    gshard_quality,
    gshard_runs,
    interference,
    translation,
    translation_page,
    translation_runs,
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
    "sparsely_gated/table7": (
        gated.shared(gated_tables.TABLE7),
        gated_tables.verdict7,
        gated_pages.table7_page,
    ),
    "sparsely_gated/table9": (
        gated.shared(gated_experts.PLAN),
        gated_experts.verdict9,
        gated_pages.table9_page,
    ),
    "sparsely_gated/translation": (
        dataclasses.asdict(translation_runs.PLAN),
        translation.verdict,
        translation_page.translation_page,
    ),
    "switch/table6": (
        distill_tables.TABLE6.to_dict(),
        distill_tables.verdict6,
        distill_pages.distilled_page,
    ),
    "switch/table7": (
        distill_tables.TABLE7.to_dict(),
        distill_tables.verdict7,
        distill_pages.distilled_page,
    ),
    "switch/table4": (
        finetune_tables.TABLE4.to_dict(),
        finetune_tables.verdict4,
        finetune_pages.tuned_page,
    ),
    "switch/table8": (
        finetune_tables.TABLE8.to_dict(),
        finetune_tables.verdict8,
        finetune_pages.tuned_page,
    ),
    "gshard/quality": (
        dataclasses.asdict(gshard_runs.PLAN),
        gshard_quality.verdict,
        gshard_page.quality_page,
    ),
}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("target", [t for t in RESULTS if (ROOT / f"{t.replace('/', '-')}.json").is_file()])
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


def test_translation_has_every_pair_of_every_seed_and_counts_what_it_says() -> None:
    record = json.loads((ROOT / "sparsely_gated-translation.json").read_text(encoding="utf-8"))
    plan = translation_runs.PLAN
    pairs = ["-".join(direction) for direction in plan.directions]
    for own in record["systems"].values():
        assert [seed["seed"] for seed in own["seeds"]] == list(plan.seeds)
        for seed in own["seeds"]:
            assert list(seed["pairs"]) == pairs
            assert seed["train"]["steps"] == plan.steps
            scores = [pair["bleu"] for pair in seed["pairs"].values()]
            assert seed["mean_bleu"] == pytest.approx(statistics.fmean(scores))
            nats, tokens = (sum(p[key] for p in seed["pairs"].values()) for key in ("dev_nats", "dev_tokens"))
            assert seed["perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert len({own["operations"] for own in record["systems"].values()}) == 1
