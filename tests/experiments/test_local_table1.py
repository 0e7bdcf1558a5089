"""Table 1 of 1991: many runs as one program, the t-test, the choice of step sizes, verdict and page."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewright.backbones import MixtureOutput
from gatewright.experiments import local_table1, registry, vowel_runs
from gatewright.experiments.descent import descend
from gatewright.experiments.local_table1 import Table1, run_table1, verdict
from gatewright.experiments.registry import reproduce
from gatewright.experiments.t_test import t_test, upper_tail
from gatewright.experiments.vowel_runs import READINGS, best_rate
from gatewright.papers import get_paper
from gatewright.training.seeded import drawn

PAPER = get_paper("local_experts")
# Large first weights: their error is above 0.25, the one of knowing nothing, which is soon reached.
TINY = Table1(("A",), 3, (1e-5, 4e-3), 2, search_limit=100, limit=150, init=1.0, inits=(0.9,))


def cases() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(12, 2, generator=draw, dtype=torch.float64)
    return x, (x.sum(-1, keepdim=True) > 1).double()


def alone(model: nn.Module, rate: float, reached: float, limit: int) -> tuple[int, float, list[Tensor]]:
    """Descend with one model in a plain loop."""
    model, (x, d), epoch = copy.deepcopy(model), cases(), 0
    parameters = list(model.parameters())
    while True:
        output = model(x)
        squared = float((d - output.blend).square().sum(-1).mean().detach())
        if squared <= reached or epoch == limit:
            return (epoch if squared <= reached else -1), squared, [p.detach() for p in parameters]
        error = PAPER.objective(PAPER.Settings())(output, d).total
        with torch.no_grad():
            for p, gradient in zip(parameters, torch.autograd.grad(error, parameters), strict=True):
                p -= rate * gradient
        epoch += 1


@pytest.mark.parametrize("experts", [3, 0])
def test_runs_as_one_program_are_the_runs_one_by_one(experts: int):
    settings = PAPER.Settings(num_experts=experts, init=0.5)
    models = [drawn(lambda: PAPER.build(settings), seed) for seed in range(3)]
    rates = [0.5, 0.02, 0.9]
    objective = PAPER.objective(settings)
    together = descend(models, objective, cases(), rates, limit=110, reached=0.15)
    found = [alone(model, rate, 0.15, 110) for model, rate in zip(models, rates, strict=True)]
    assert together.epochs.tolist() == [epochs for epochs, _, _ in found]
    # Some end early and some never, so that runs are taken out of the program on the way.
    assert -1 in together.epochs.tolist()
    assert 0 < min(e for e in together.epochs.tolist() if e > 0) < 100
    assert together.squared_error.tolist() == pytest.approx([squared for _, squared, _ in found], rel=1e-9)
    for run, (_, _, weights) in enumerate(found):
        for own, plain in zip(together.weights.values(), weights, strict=True):
            torch.testing.assert_close(own[run], plain, rtol=1e-9, atol=1e-12)
    x, d = cases()
    squared = (d - together.answer(x).blend).square().sum(-1).mean(-1)
    torch.testing.assert_close(squared, together.squared_error, rtol=1e-9, atol=0.0)


def test_drawing_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, again = (drawn(lambda: PAPER.build(PAPER.Settings()), seed) for seed in (0, 1, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.experts.weight, again.experts.weight)
    assert not torch.equal(one.experts.weight, two.experts.weight)


def test_the_t_test_is_the_one_of_the_tables():
    # Student's table: one-sided 2.5 % at 10 degrees, 5 % at 5, 0.5 % at 48; t = 1 at 1 and 2 degrees by hand.
    for t, degrees, p in ((2.228139, 10, 0.025), (2.015048, 5, 0.05), (2.682204, 48, 0.005), (1, 1, 0.25)):
        assert upper_tail(t, degrees) == pytest.approx(p, rel=1e-5)
        assert upper_tail(-t, degrees) == pytest.approx(1 - p, rel=1e-5)
    assert upper_tail(1, 2) == pytest.approx((1 - 1 / 3**0.5) / 2)
    # Means 2 and 5, variances 1 and 4, pooled 2.5: t = 3 / sqrt(2.5 * 2 / 3).
    found = t_test([1, 2, 3], [3, 5, 7])
    assert found is not None
    assert (found.t, found.degrees) == (pytest.approx(3 / (5 / 3) ** 0.5), 4)
    assert t_test([1], [1, 2]) is None
    assert t_test([1, 1], [2, 2]) is None


def test_the_best_step_size_is_the_fastest_at_which_every_run_ends():
    batch = {"rates": [0.1, 0.1, 0.2, 0.2, 0.3, 0.3], "epochs": [50, 70, 40, 60, 10, None]}
    assert best_rate(batch, (0.1, 0.2, 0.3)) == 0.2
    assert best_rate({"rates": [0.1], "epochs": [None]}, (0.1,)) is None


@pytest.mark.parametrize(("name", "columns"), [("A", 1), ("A, crossed", 1), ("B", 4)])
def test_readings_code_the_vowels_as_they_say(name: str, columns: int):
    vowels = vowel_runs.peterson_barney().of_speakers([1])
    x, d = READINGS[name].cases(vowels)
    assert x[0].tolist() == [0.24, 2.28]
    assert d.shape == (8, columns)
    rows = {"A": [1, 0, 1, 0], "A, crossed": [1, 0, 0, 1], "B": [0, 1, 2, 3]}[name]
    told = d.squeeze(-1) if columns == 1 else d.argmax(-1)
    assert told.tolist() == [row for row in rows for _ in range(2)]


def test_what_is_right_and_who_is_left_is_counted_by_run():
    def experts(p: list[float], blend: list[float]) -> Any:
        """Return a run's answer to every case: the gate's shares and the blend of the first eight."""
        rows = len(vowels.vowel)
        logits = torch.tensor(p, dtype=torch.float64).log().expand(rows, len(p))
        told = torch.tensor(blend, dtype=torch.float64).repeat(rows // len(blend)).unsqueeze(-1)
        return MixtureOutput(torch.zeros(rows, len(p), 1), logits, told)

    vowels = vowel_runs.peterson_barney().of_speakers([1, 2])
    answers = [
        experts([0.96, 0.04], [0.9, 0.9, 0.1, 0.1, 0.9, 0.9, 0.1, 0.1]),
        experts([0.51, 0.49], [0.9, 0.4, 0.1, 0.6, 0.9, 0.4, 0.1, 0.6]),
    ]
    both = MixtureOutput(*(torch.stack(parts) for parts in zip(*answers, strict=True)))
    done = SimpleNamespace(answer=lambda _: both)
    assert vowel_runs._survivors(done, vowels.formants) == [1, 2]
    assert vowel_runs.percents_right(done, READINGS["A"].cases(vowels)) == [100, 50]


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion that every system meets within a hundred epochs."""
    monkeypatch.setitem(READINGS, "A", dataclasses.replace(READINGS["A"], reached=0.25))


@pytest.mark.usefixtures("easy")
def test_a_reproduction_writes_every_run_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(work: Path, quick: bool) -> Any:
        return run_table1(work, quick, TINY)

    target = dataclasses.replace(registry.TARGETS["local_experts/table1"], run=run)
    monkeypatch.setitem(registry.TARGETS, "local_experts/table1", target)
    done = reproduce("local_experts/table1", out=tmp_path / "out", work=tmp_path / "work")
    record = json.loads((tmp_path / "out" / "local_experts-table1.json").read_text())
    page = (tmp_path / "out" / "local_experts-table1.md").read_text()
    assert done.sentence == record["verdict"]["sentence"]
    assert done.sentence in page
    assert (tmp_path / "out" / "local_experts-table1-epochs.png").stat().st_size > 1000
    for size, own in record["readings"]["A"]["systems"].items():
        assert own["runs"]["seeds"] == [0, 1, 2]
        assert f"- {size}: epochs {' '.join(map(str, own['runs']['epochs']))}" in page
        assert list(own["inits"]) == ["0.9"]

    def never(*_: Any) -> None:
        raise AssertionError("a batch that was kept is run again")

    monkeypatch.setattr(local_table1, "run_batch", never)
    again, _, _ = run_table1(tmp_path / "work", False, TINY)
    assert again["readings"] == record["readings"]


def test_the_quick_form_is_a_part_of_the_full_one():
    quick = local_table1.quick_form(local_table1.PLAN)
    assert quick.readings == ("A",)
    assert quick.seeds < local_table1.PLAN.seeds
    assert set(quick.rates) < set(local_table1.PLAN.rates)


def toy(mixtures: list[int], nets: list[int], left: list[int]) -> dict[str, Any]:
    """Return a record in which both mixtures and both nets took these epochs."""
    systems = {}
    for size in local_table1.PAPER:
        epochs = mixtures if size in local_table1.MIXTURES else nets
        runs = {"epochs": epochs, "survivors": left, "train_percent": [90.0], "test_percent": [90.0]}
        systems[size] = {"rate": 0.1, "runs": runs, "summary": local_table1.summary(runs)}
    return {"readings": {"A": {"systems": systems}}}


@pytest.mark.parametrize(
    ("mixtures", "nets", "left", "held"),
    [
        ([99, 100, 101], [170, 180, 190], [2, 3, 2, 2, 1], True),
        ([99, 100, 101], [169, 179, 189], [2, 2, 2, 2, 2], False),
        ([90, 100, 110], [195, 200, 205], [2, 2, 2, 2, 2], False),
        ([99, 100, 101], [170, 180, 190], [2, 2, 2, 4, 1], False),
    ],
)
def test_the_verdict_asks_for_all_three(mixtures: list[int], nets: list[int], left: list[int], held: bool):
    found = verdict(toy(mixtures, nets, left))
    assert found["held"] == held
    assert found["sentence"].startswith("held" if held else "did not hold")


def test_the_verdict_names_runs_and_systems_that_never_end():
    record = toy([99, 100, 101], [170, 180, 190], [2, 2, 2])
    late = record["readings"]["A"]["systems"]["back-propagation-12"]
    late["runs"] = {**late["runs"], "epochs": [170, None, 190]}
    late["summary"] = local_table1.summary(late["runs"])
    assert "never reached the criterion: 1 of back-propagation-12" in verdict(record)["sentence"]
    late["rate"] = None
    assert verdict(record)["sentence"].endswith("did every run of back-propagation-12 end")
