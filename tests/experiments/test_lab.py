"""Experiments with many arms: what is counted, what is kept when they stop, and what their pages say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from gatewright.data import Corpus
from gatewright.experiments import arms, balance, lab, rules_compared, steps
from gatewright.experiments.lab import Arm, Plan
from gatewright.experiments.lab_pages import lab_page, lab_pictures, mean_bits, ranked
from gatewright.parts import Capacity, all_routers
from tests.training.runs import FixedText

ARMS = (
    Arm("twin", None, 1, 1, 8),
    Arm("plain", "token_choice", 4, 2, 4, losses={"balance": 1e-2}),
    Arm("ahead", "expert_choice", 4, 2, 4),
)
TINY = Plan(
    arms=ARMS,
    baseline="plain",
    width=8,
    num_layers=1,
    context=8,
    rows=2,
    steps=5,
    seeds=(0, 1),
    warmup_steps=2,
    eval_bytes=64,
    timing_rounds=3,
)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the default corpus."""
    monkeypatch.setattr(lab, "open_corpus", lambda *_, **__: FixedText())


def counts(*rows: list[int], kept: list[int] | None = None, tokens: int = 8) -> list[Any]:
    return [
        {
            "layers.0.router": {
                "counts": torch.tensor(row),
                "kept": torch.tensor(row if kept is None else kept),
                "tokens": torch.tensor(tokens),
                "unrouted": torch.tensor(2),
            }
        }
        for row in rows
    ]


def test_balance_is_counted_by_hand():
    # Two batches of 8 tokens, 4 experts. Loads 8, 0, 4, 4: mean 4, MaxVio 1. Loads 4, 4, 4, 4: MaxVio 0.
    found = lab.balance_of(counts([8, 0, 4, 4], [4, 4, 4, 4]))
    assert found["max_violation"] == pytest.approx(0.5)
    assert found["experts_per_token"] == pytest.approx(2.0)
    assert found["unrouted"] == pytest.approx(0.25)
    # Summed: 12, 4, 8, 8 of an even 8; none has less than 0.8.
    assert found["dead"] == [0]
    # 16 made, 12 kept: a quarter dropped; expert 1 has nothing, an even share is 4.
    found = lab.balance_of(counts([8, 0, 4, 4], kept=[4, 0, 4, 4]))
    assert found["dropped"] == pytest.approx(0.25)
    assert found["dead"] == [1]


def test_every_arm_and_seed_is_run_once_and_kept(
    fixed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained: list[tuple[str, int]] = []
    train = lab.train

    def spy(plan: Plan, arm: Arm, corpus: Corpus, seed: int) -> Any:
        trained.append((arm.name, seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(plan, arm, corpus, seed)

    monkeypatch.setattr(lab, "train", spy)
    with pytest.raises(KeyboardInterrupt):
        lab.run_plan(TINY, tmp_path, "toy")
    assert trained == [("twin", 0), ("plain", 0), ("ahead", 0), ("twin", 1)]
    record = lab.run_plan(TINY, tmp_path, "toy")
    assert trained[4:] == [("twin", 1), ("plain", 1), ("ahead", 1)]
    again = lab.run_plan(TINY, tmp_path, "toy")
    assert len(trained) == 7
    assert again == record
    # Other settings are another experiment.
    lab.run_plan(dataclasses.replace(TINY, steps=6, seeds=(0,)), tmp_path, "toy")
    assert len(trained) == 10


def test_arms_of_a_seed_see_the_same_tokens_and_seeds_differ(fixed: None):
    text = cast(Corpus, FixedText())
    one, other = (lab.stepper_of(TINY, arm, text, 0) for arm in (ARMS[0], ARMS[1]))
    assert (one.stream.batch(3) == other.stream.batch(3)).all()
    bits = [lab.train(TINY, ARMS[1], text, seed)["valid_bpb"] for seed in (0, 0, 1)]
    assert bits[0] == bits[1] != bits[2]


def test_a_run_that_diverges_is_said_to(fixed: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps.Stepper, "advance", lambda self: (math.nan, {}))
    found = lab.train(TINY, ARMS[1], cast(Corpus, FixedText()), 0)
    assert found == {"seed": 0, "diverged_at": 1, "valid_bpb": None}


def test_step_times_are_paired_and_sides_take_turns_in_going_first(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []

    class Side:
        def __init__(self, name: str, took: float) -> None:
            self.name, self.took = name, took

        def advance(self) -> None:
            order.append(self.name)
            clock[0] += self.took

    clock = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: clock[0])
    found = steps.step_time_ratio(cast(Any, Side("a", 2.0)), cast(Any, Side("b", 3.0)), 4)
    assert found["median"] == found["low"] == found["high"] == pytest.approx(1.5)
    assert (found["baseline_ms"], found["ms"]) == (pytest.approx(2000), pytest.approx(3000))
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab" + "ba"


def test_the_page_shows_every_seed_and_marks_what_looks_ahead(fixed: None, tmp_path: Path):
    record = lab.run_plan(TINY, tmp_path, "toy")
    record |= {"target": "toy/arms", "claim": "c", "quick": False, "created": "today"}
    record |= {
        "environment": {"gatewright": "0", "commit": "x", "torch": "2", "threads": 1, "processor": "p"}
    }
    record["verdict"] = {"held": True, "sentence": "held: all is well"}
    page = lab_page(record, "Toy")
    for arm in record["arms"].values():
        assert all(f"{own['valid_bpb']:.4f}" in page for own in arm["seeds"])
    assert "ahead (looks ahead)" in page
    assert "held: all is well" in page
    assert ranked(record) == sorted(["twin", "plain"], key=lambda name: mean_bits(record["arms"][name]) or 0)
    assert "ahead" in ranked(record, causal_only=False)
    (picture,) = lab_pictures(record, tmp_path).values()
    assert picture.read_bytes().startswith(b"\x89PNG")
    # 2 * 3 * D * F * experts per token, as computed: 6 * 8 * 4 * 2, and the twin 6 * 8 * 8.
    assert record["arms"]["plain"]["active_flops"] == record["arms"]["twin"]["active_flops"] == 384


def test_an_arm_is_trained_at_its_own_rate_and_the_page_says_which(fixed: None, tmp_path: Path):
    text = cast(Corpus, FixedText())
    quick_one = dataclasses.replace(ARMS[1], learning_rate=0.02)
    rates = []
    for arm in (ARMS[1], quick_one):
        stepper = lab.stepper_of(TINY, arm, text, 0)
        for _ in range(2):
            stepper.advance()
        rates.append(stepper.optimizer.param_groups[0]["lr"])
    # The second step ends the warm-up: the peak, at the start of the cosine.
    assert rates[1] / rates[0] == pytest.approx(0.02 / TINY.learning_rate)
    plan = dataclasses.replace(TINY, arms=(ARMS[0], quick_one), seeds=(0,))
    record = lab.run_plan(plan, tmp_path, "toy")
    assert "learning_rate" not in record["arms"]["twin"]
    record |= {"target": "toy/arms", "claim": "c", "quick": False, "created": "today"}
    record |= {
        "environment": {"gatewright": "0", "commit": "x", "torch": "2", "threads": 1, "processor": "p"}
    }
    record["verdict"] = {"held": True, "sentence": "held"}
    assert "AdamW at 0.003 for twin; 0.02 for plain, weight decay" in lab_page(record, "Toy")
    for arm in record["arms"].values():
        arm.pop("learning_rate", None)
    assert "AdamW at 0.003 for all arms, weight decay" in lab_page(record, "Toy")


def test_the_experiments_cover_every_rule_at_equal_width():
    compared = {arm.router for arm in rules_compared.ARMS if arm.router}
    missing = {info.name for info in all_routers()} - compared
    assert missing <= {"device_limited"}, "the same rule as deepseek_v2"
    for arm in rules_compared.ARMS:
        share = 1 / 8 if arm.router == "mixture_of_depths" else arm.num_selected
        assert arm.expert_width * share == 256, arm.name
    coefficients = [arm.losses.get("balance") for arm in balance.ARMS if set(arm.losses) == {"balance"}]
    assert coefficients == [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    for plan in (balance.PLAN, rules_compared.PLAN):
        assert plan.seeds == (0, 1, 2)
        names = [arm.name for arm in plan.arms]
        assert len(set(names)) == len(names)
        assert plan.baseline in names
        json.dumps([lab._plain(arm) for arm in plan.arms])
        quick = arms.quick_form(plan)
        assert quick.seeds == (0,)
        assert quick.steps * 8 == plan.steps


def test_an_arm_looks_ahead_by_its_rule_or_by_its_capacity():
    assert lab._facts(Arm("a", "expert_choice", 8, 2, 4)) == {"causal": False}
    assert lab._facts(Arm("a", "gshard", 8, 2, 4)) == {"causal": False}
    assert lab._facts(Arm("a", "gshard", 8, 2, 4, capacity=Capacity(1.0))) == {"causal": True}
    assert lab._facts(Arm("a", "gshard", 8, 2, 4, capacity=Capacity(1.0, order="rank"))) == {"causal": False}
    assert lab._facts(Arm("a", "expert_choice", 8, 2, 4, capacity=Capacity(1.0))) == {"causal": False}
    assert lab._facts(Arm("a", None)) == {"causal": True}


def seed(bits: float, violation: float, dropped: float) -> dict[str, Any]:
    return {"valid_bpb": bits, "training": {"max_violation": violation, "dropped": dropped}}


@pytest.mark.parametrize(
    ("own", "held"),
    [((2.0, 0.5, 0.1), True), ((2.2, 0.5, 0.1), False), ((2.0, 4.5, 0.1), False), ((2.0, 0.5, 0.4), False)],
    ids=["all of it", "worse quality", "less even", "drops more"],
)
def test_the_balance_verdict_asks_for_all_three(own: tuple[float, float, float], held: bool):
    both = {
        "none": {"causal": True, "seeds": [seed(2.1, 4.0, 0.3)]},
        "balance 0.01": {"causal": True, "seeds": [seed(*own)]},
    }
    assert balance._verdict({"arms": both})["held"] is held


def test_the_comparison_s_verdict_names_who_does_not_beat_the_twin():
    def arm(*bits: float | None, causal: bool = True) -> dict[str, Any]:
        return {"causal": causal, "seeds": [{"valid_bpb": b} for b in bits]}

    arms = {"dense twin": arm(2.0, 2.0), "dense mixture": arm(3.0, 3.0), "good": arm(1.9, 1.8)}
    assert rules_compared._verdict({"arms": arms})["held"]
    arms |= {"half": arm(1.9, 2.1), "broken": arm(1.9, None), "ahead": arm(2.5, 2.5, causal=False)}
    verdict = rules_compared._verdict({"arms": arms})
    assert not verdict["held"]
    assert verdict["not_below_the_twin"] == ["half", "broken"]
    assert "best causal rule on average: good" in verdict["sentence"]
