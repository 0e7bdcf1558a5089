"""hme/table1: each system's run, what is counted, the verdict, and a stopped reproduction that goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.experiments import hme_table1, registry
from gatewright.experiments.arm_runs import arms, descent_runs, em_run, linear_run, on_line_run
from gatewright.experiments.hme_table1 import PAPER, Table1, quick_form, run_hme_table1, summary, verdict
from gatewright.papers import get_paper
from gatewright.training.em import EM
from gatewright.training.seeded import drawn

TINY = Table1(300, 100, seeds=(0, 1), em_epochs=4, on_line_epochs=2, gradient_epochs=2, net_epochs=20)
CASES = arms(300, 100, 0)


def test_inputs_have_spread_1_and_outputs_keep_their_proportions():
    x, y = CASES.train
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(12, dtype=torch.float64))
    variances = y.var(0, correction=0)
    assert float(variances.mean()) == pytest.approx(1)
    assert float(variances.max()) > 2 * float(variances.min())
    # An answer of the test cases' own mean is the unit of the relative error.
    assert CASES.error(CASES.test.y.mean(0).expand(100, 4)) == pytest.approx(1)
    assert CASES.error(CASES.test.y) == 0


def test_a_linear_map_is_the_one_pass_of_least_squares():
    ones = torch.cat([CASES.train.x, torch.ones(300, 1, dtype=torch.float64)], 1)
    weights = torch.linalg.pinv(ones) @ CASES.train.y
    answer = torch.cat([CASES.test.x, torch.ones(100, 1, dtype=torch.float64)], 1) @ weights
    assert linear_run(CASES)["errors"] == pytest.approx([CASES.error(answer)])


def test_em_runs_are_told_by_epoch_and_their_likelihood_never_falls():
    run = em_run(CASES, 1, "hme-16", EM(covariance="shared", floor=0.05), 4)
    assert run["epochs"] == [1, 2, 3, 4]
    assert len(run["log_likelihood"]) == 5
    assert run["log_likelihood"] == sorted(run["log_likelihood"])
    assert max(run["errors"]) < 1
    other = em_run(CASES, 2, "hme-16", EM(), 1)
    assert other["errors"][0] != run["errors"][0]


def test_the_last_error_of_a_descent_is_that_of_its_weights():
    runs = descent_runs(CASES, (0, 1), "back-propagation-60", 0.5, 20, 10)
    paper = get_paper("hme")
    settings = paper.PUBLISHED["back-propagation-60"]
    model = drawn(lambda: paper.build(settings), 1)
    for _ in range(20):
        total = paper.objective(settings)(model(CASES.train.x), CASES.train.y).total
        gradients = torch.autograd.grad(total, list(model.parameters()))
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.data -= 0.5 / 300 * g
    assert [run["epochs"] for run in runs] == [[10, 20], [10, 20]]
    assert runs[1]["errors"][-1] == pytest.approx(CASES.error(model(CASES.test.x).blend.detach()))


@pytest.mark.parametrize("gradient", [None, {"rate": 0.02, "variance": 0.05}])
def test_on_line_runs_learn_in_one_pass(gradient: dict[str, float] | None):
    run = on_line_run(CASES, 0, "hme-16", 2, gradient)
    assert run["epochs"] == [1, 2]
    assert max(run["errors"]) < 1


def test_a_reproduction_writes_every_run_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny = registry.Target("hme/tiny", "a claim", partial(run_hme_table1, plan=TINY))
    monkeypatch.setitem(registry.TARGETS, "hme/tiny", tiny)
    done = registry.reproduce("hme/tiny", out=tmp_path / "out", work=tmp_path / "work")
    record = json.loads((tmp_path / "out" / "hme-tiny.json").read_text())
    page = (tmp_path / "out" / "hme-tiny.md").read_text()
    assert done.sentence == record["verdict"]["sentence"]
    assert done.sentence in page
    assert (tmp_path / "out" / "hme-tiny-learning.png").stat().st_size > 1000
    assert set(record["systems"]) == set(PAPER)
    for name, own in record["systems"].items():
        alone = name in ("linear", "CART")
        assert [run["seed"] for run in own["runs"]] == ([0] if alone else [0, 1])
        assert " ".join(f"{error:.4f}" for error in own["summary"]["least"]) in page

    def never(*_: Any) -> None:
        raise AssertionError("a run that was kept is made again")

    for name in ("em_run", "on_line_run", "descent_runs", "cart_run", "linear_run"):
        monkeypatch.setattr(hme_table1, name, never)
    again, _, _ = run_hme_table1(tmp_path / "work", False, TINY)
    assert again["systems"] == record["systems"]


def test_the_quick_form_is_a_part_of_the_full_one():
    quick = quick_form(hme_table1.PLAN)
    assert quick.train < hme_table1.PLAN.train
    assert quick.seeds == (0,)
    assert replace(quick, em=EM()).em_epochs < hme_table1.PLAN.em_epochs


def test_epochs_are_those_to_within_a_twentieth_of_the_least():
    runs = [
        {"epochs": [10, 20, 30, 40], "errors": [0.5, 0.105, 0.1, 0.2], "cpu_seconds": 1.0},
        {"epochs": [10, 20, 30, 40], "errors": [0.5, 0.3, 0.106, 0.1], "cpu_seconds": 3.0},
    ]
    found = summary(runs)
    assert found["least"] == [0.1, 0.1]
    assert found["epochs"] == [20, 40]
    assert found["epochs_mean"] == 30
    assert found["last"] == [0.2, 0.1]
    assert found["cpu_seconds"] == 2


def toy(exact: list[float], epochs: int = 10, cart: float = 0.2, net: int = 100) -> dict[str, Any]:
    def system(least: list[float], passes: int) -> dict[str, Any]:
        return {"summary": {"least": least, "error_mean": sum(least) / len(least), "epochs_mean": passes}}

    return {
        "systems": {
            "linear": system([0.4], 1),
            "CART": system([cart], 1),
            "back-propagation": system([0.1], net),
            "exact EM": system(exact, epochs),
            "least-squares EM": system(exact, 10),
        }
    }


@pytest.mark.parametrize(
    ("record", "held"),
    [
        (toy([0.19, 0.18]), True),
        (toy([0.19, 0.33], cart=0.4), False),
        (toy([0.19, 0.18], cart=0.185), False),
        (toy([0.19, 0.18], epochs=11), False),
        (toy([0.19, 0.18], net=99), False),
    ],
)
def test_the_verdict_asks_for_error_and_epochs(record: dict[str, Any], held: bool):
    found = verdict(record)
    assert found["held"] == held
    assert found["sentence"].startswith("held" if held else "did not hold")
