"""The papers' own models, arm by arm: kept, equal in all but what an arm says, and told on a page."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pytest

from gatewright.data import Corpus
from gatewright.experiments import steps, trial_pages, trials
from gatewright.experiments.trials import Course, Trained, paper_trial
from scripts import figures
from tests.training.runs import FixedText

SIZES: dict[str, Any] = {"width": 8, "num_layers": 1, "num_heads": 1, "head_dim": 8, "context": 8}
TINY = Course(
    trials=(
        paper_trial("sparse", "olmoe", num_experts=4, num_selected=2, expert_width=4, **SIZES),
        paper_trial("dense", "olmoe", "one MLP", moe_layers="none", ffn_width=8, **SIZES),
    ),
    baseline="dense",
    steps=6,
    rows=2,
    context=8,
    seeds=(0, 1),
    warmup_steps=2,
    eval_bytes=64,
    evaluations=3,
    timing_rounds=3,
)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the default corpus."""
    monkeypatch.setattr(trials, "open_corpus", lambda *_, **__: FixedText())


def test_every_arm_is_run_once_looked_at_and_kept(fixed: None, tmp_path: Path):
    seen = []

    def look(trained: Trained) -> dict[str, Any]:
        seen.append(trained.seed)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"steps_seen": len(trained.losses)}

    with pytest.raises(KeyboardInterrupt):
        trials.run_course(TINY, tmp_path, "toy", look)
    record = trials.run_course(TINY, tmp_path, "toy", look)
    # The two of seed 0 were kept; the third is looked at again.
    assert seen == [0, 0, 1, 1, 1]
    assert trials.run_course(TINY, tmp_path, "toy", look) == record
    for arm in record["arms"].values():
        assert [own["steps_seen"] for own in arm["seeds"]] == [6, 6]
        assert [point["step"] for point in arm["seeds"][0]["path"]] == [2, 4, 6]
        assert arm["seeds"][0]["path"][-1]["valid_bpb"] == arm["seeds"][0]["valid_bpb"]
    # Other settings are another experiment.
    trials.run_course(dataclasses.replace(TINY, seeds=(0,), steps=3), tmp_path, "toy", look)
    assert len(seen) == 7


def test_seeds_differ_and_repeat(fixed: None):
    text = cast(Corpus, FixedText())
    own = TINY.trials[0]
    bits = [trials.train_trial(TINY, own, text, seed, None)["valid_bpb"] for seed in (0, 0, 1)]
    assert bits[0] == bits[1] != bits[2]
    faster = dataclasses.replace(own, learning_rate=1e-2)
    assert trials.train_trial(TINY, faster, text, 0, None)["valid_bpb"] != bits[0]
    one, other = (trials.stepper(TINY, trial, text, 0) for trial in TINY.trials)
    assert (one.stream.batch(3) == other.stream.batch(3)).all()


def test_a_run_that_diverges_is_said_to(fixed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    take, taken = steps.Stepper.advance, []

    def burst(self: steps.Stepper) -> Any:
        taken.append(take(self))
        return (math.nan, {}) if len(taken) == 3 else taken[-1]

    monkeypatch.setattr(steps.Stepper, "advance", burst)
    record = trials.run_course(dataclasses.replace(TINY, seeds=(0,)), tmp_path, "toy")
    assert record["arms"]["sparse"]["seeds"][0]["diverged_at"] == 3
    assert trial_pages.diverged(record) == ["sparse"]
    assert trial_pages.above(record, "sparse", "dense") is None


def test_the_page_tells_every_arm_and_the_figures_read_the_record(fixed: None, tmp_path: Path):
    def verdict(record: dict[str, Any]) -> dict[str, Any]:
        found = trial_pages.above(record, "dense", "sparse")
        return {"held": True, "sentence": f"held: {found}", "table": ["| own |", ""]}

    record, page, pictures = trial_pages.run_trials(
        TINY, tmp_path, False, "olmoe/toy", "A toy", "none", verdict
    )
    for name, arm in record["arms"].items():
        assert f"| {name} | " in page
        assert all(f"{own['valid_bpb']:.4f}" in page for own in arm["seeds"])
        assert f"{arm['cost']['total_parameters']:,}" in page
    assert "- dense: one MLP" in page
    assert "| own |" in page
    assert "![arms](olmoe-toy-arms.png)" in page
    assert pictures["arms"].stat().st_size > 1000
    block = figures.arms_block(record, "olmoe-toy.json")
    assert "| own |" in block
    assert record["verdict"]["sentence"] in block
