"""Fixed joint weights against gates that see the input: equal sizes, what stays fixed, and the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.experiments.descent import descend
from gatewright.experiments.local_ensemble import ARMS, Ensemble, run_ensemble, verdict
from gatewright.experiments.vowel_runs import READINGS, TRAIN, peterson_barney
from gatewright.papers import get_paper
from gatewright.training.seeded import drawn

PAPER = get_paper("local_experts")


def test_frozen_weights_stay_and_the_others_learn():
    arm = ARMS["fixed"]
    settings = PAPER.Settings(num_experts=arm.num_experts, error=arm.error)
    model = drawn(lambda: PAPER.build(settings), 0)
    cases = READINGS["A"].cases(peterson_barney().of_speakers(TRAIN))
    done = descend([model], PAPER.objective(settings), cases, [0.05], limit=5, reached=0.0, frozen=arm.frozen)
    assert not done.weights["router.weight"].any()
    for name in ("router.bias", "experts.weight", "experts.bias"):
        assert not torch.equal(done.weights[name][0], model.get_parameter(name).detach()), name
    # Without the weights of its inputs, the gate says the same of every case.
    logits = done.answer(cases[0]).logits[0]
    assert torch.equal(logits, logits[:1].expand_as(logits))


def test_averaged_nets_learn_as_each_would_alone():
    arm = ARMS["averaged"]
    settings = PAPER.Settings(num_experts=arm.num_experts, error=arm.error)
    model = drawn(lambda: PAPER.build(settings), 0)
    cases = READINGS["A"].cases(peterson_barney().of_speakers(TRAIN))
    done = descend(
        [model], PAPER.objective(settings), cases, [arm.rate], limit=20, reached=0.0, frozen=arm.frozen
    )
    weight, bias = model.experts.weight.detach()[3, 0].clone(), model.experts.bias.detach()[3].clone()
    x, d = cases
    for _ in range(20):
        o = torch.sigmoid(x @ weight + bias)
        slope = (o - d[:, 0]) * o * (1 - o)
        weight, bias = weight - 0.05 * (slope @ x), bias - 0.05 * slope.sum()
    torch.testing.assert_close(done.weights["experts.weight"][0, 3, 0], weight)
    torch.testing.assert_close(done.weights["experts.bias"][0, 3], bias)


def test_a_short_run_has_every_system_at_equal_size(tmp_path: Path):
    record, page, pictures = run_ensemble(tmp_path, False, Ensemble(seeds=2, updates=4))
    assert {arm["weights"] for arm in record["systems"].values()} == {24}
    assert list(record["systems"]) == list(ARMS)
    for name, arm in record["systems"].items():
        assert len(arm["test_error"]) == len(arm["test_percent"]) == 2
        assert f"| {name} |" in page
    assert record["verdict"]["sentence"] in page
    assert pictures["errors"].stat().st_size > 1000


@pytest.mark.parametrize(
    ("gated", "held", "said"),
    [
        ([0.05, 0.05], True, "0.50 of that of the best other system (together), and the lowest in 2 of 2"),
        ([0.06, 0.05], False, "0.55"),
        ([0.0, 0.09], False, "0.45 of that of the best other system (together), and the lowest in 1 of 2"),
    ],
)
def test_the_verdict_takes_the_best_of_the_others(gated: list[float], held: bool, said: str):
    errors = {"gated": gated, "fixed": [0.2, 0.2], "averaged": [0.3, 0.3], "together": [0.12, 0.08]}
    record: dict[str, Any] = {"systems": {name: {"test_error": own} for name, own in errors.items()}}
    found = verdict(record)
    assert found["held"] == held
    assert said in found["sentence"]
