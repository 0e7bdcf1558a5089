"""Figures 2 and 3 of 1991: lines, their feet, how far they go together, and what is concluded from them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.experiments import local_figures
from gatewright.experiments.descent import descend
from gatewright.experiments.local_figures import Figure, feet, figure_target, percent_right, together, verdict
from gatewright.papers import get_paper
from gatewright.training.seeded import drawn


def test_a_foot_lies_on_its_line_and_nearest_to_the_origin():
    # 3 x + 4 y - 10 = 0 is 2 away from the origin, along (3, 4) / 5.
    line = torch.tensor([[3.0, 4.0, -10.0]], dtype=torch.float64)
    torch.testing.assert_close(feet(line), torch.tensor([[1.2, 1.6]], dtype=torch.float64))
    # Twice the weights are the same line, and so is its other side.
    for scale in (2, -1):
        torch.testing.assert_close(feet(scale * line), feet(line))


def test_a_line_is_right_where_its_side_is_the_target_s():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    targets = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assert percent_right(torch.tensor([1.0, 0.0, -1.5]), (x, targets)) == 100
    assert percent_right(torch.tensor([1.0, 0.0, -0.5]), (x, targets)) == 75
    assert percent_right(torch.tensor([-1.0, 0.0, 1.5]), (x, targets)) == 0


def test_lines_are_together_by_direction_alone():
    lines = torch.tensor([[[1.0, 0.0, 5.0], [3.0, 0.0, -5.0]], [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
    torch.testing.assert_close(together(lines), torch.tensor([1.0, 0.5**0.5]))
    assert together(torch.tensor([[1.0, 1.0, 0.0], [-2.0, -2.0, 0.0]])).item() == 0


def test_who_watches_sees_the_weights_before_each_update():
    paper = get_paper("local_experts")
    settings = paper.Settings(num_experts=2)
    models = [drawn(lambda: paper.build(settings), seed) for seed in range(2)]
    x = torch.rand(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cases, seen = (x, (x[:, :1] > 0.5).double()), []

    def watch(epoch: int, live: torch.Tensor, weights: Any) -> None:
        seen.append((epoch, live.tolist(), weights["experts.bias"].detach().clone()))

    done = descend(models, paper.objective(settings), cases, [0.1, 0.1], limit=3, reached=0.0, watch=watch)
    assert [(epoch, live) for epoch, live, _ in seen] == [(epoch, [0, 1]) for epoch in range(4)]
    start = torch.stack([model.experts.bias.detach() for model in models])
    assert torch.equal(seen[0][2], start)
    assert torch.equal(seen[-1][2], done.weights["experts.bias"])
    assert not torch.equal(seen[0][2], seen[1][2])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str, dict[str, Path]]]:
    """Both figures after a few updates of two seeds."""
    plan = Figure(3, seeds=(1, 2), limit=12, alone=40)
    return {
        name: figure_target(plan, name, "a claim")(tmp_path_factory.mktemp(name), False)
        for name in ("figure2", "figure3")
    }


@pytest.mark.parametrize("name", ["figure2", "figure3"])
def test_a_figure_has_every_seed_its_page_and_its_picture(name: str, short: dict[str, Any]):
    record, page, pictures = short[name]
    assert [run["seed"] for run in record["runs"]] == [1, 2]
    for run in record["runs"]:
        assert run["epochs"] is None
        assert run["used"] == [0, 1, 2]
        assert f"| {run['seed']} | never | 0, 1, 2 |" in page
    # Epochs 0, 5 and 10 of 0 to 12, three experts each, of the run that is drawn.
    assert [len(row) for row in record["runs"][0]["feet"]] == [3, 3, 3]
    assert "feet" not in record["runs"][1]
    assert record["verdict"]["sentence"] in page
    assert pictures["lines"].stat().st_size > 1000


def test_the_last_line_is_that_of_the_run(short: dict[str, Any]):
    record = short["figure2"][0]
    paper = get_paper("local_experts")
    settings = paper.Settings(num_experts=3)
    model = drawn(lambda: paper.build(settings), 2)
    cases = local_figures.READING.cases(local_figures.peterson_barney().of_speakers(local_figures.TRAIN))
    done = descend([model], paper.objective(settings), cases, [0.05], limit=12, reached=0.08)
    weight = done.weights["experts.weight"][0].flatten(1)
    assert torch.tensor(record["runs"][1]["lines"], dtype=torch.float64)[:, :2].tolist() == [
        pytest.approx(row) for row in weight.tolist()
    ]
    assert len(record["runs"][1]["gate"][0]) == 3


def toy() -> dict[str, Any]:
    """Return a record that shows all that is claimed."""
    pairs = {"[i], [I]": {"expert": 0, "percent": 94.0}, "[a], [^]": {"expert": 2, "percent": 89.0}}
    run = {"used": [0, 2], "pairs": pairs, "together": {"start": 0.2, "most": 0.95, "end": 0.5}}
    alone = {"[i], [I]": {"percent": 95.0}, "[a], [^]": {"percent": 91.0}}
    return {"plan": {"num_experts": 3}, "alone": alone, "runs": [run, copy.deepcopy(run)]}


def test_the_verdict_asks_for_every_part_in_every_seed():
    assert verdict(toy(), paths=True)["held"]
    for change in ("used", "expert", "percent", "most", "start"):
        record = toy()
        run = record["runs"][1]
        if change == "used":
            run["used"] = [0, 1, 2]
        elif change == "expert":
            run["pairs"]["[a], [^]"]["expert"] = 0
        elif change == "percent":
            run["pairs"]["[a], [^]"]["percent"] = 88.9
        else:
            run["together"] |= {"most": 0.89} if change == "most" else {"start": 0.95}
        assert not verdict(record, paths=True)["held"], change
        assert verdict(record, paths=False)["held"] == (change in ("most", "start")), change
