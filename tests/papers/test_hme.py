"""The tree of 1994 as a paper file: its sizes against the net's, its start, and its gradient form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gatewright.backbones import ExpertTree, HiddenLayer
from gatewright.errors import UserError
from gatewright.papers import get_paper
from gatewright.training.seeded import drawn

FILE = get_paper("hme")


@pytest.mark.parametrize(
    ("name", "experts", "gates", "parameters"),
    [
        # 16 experts of 4 x 13 and 15 gates of 13; the net has 12 x 60 + 60 and 60 x 4 + 4.
        ("hme-16", 16, 15, 16 * 52 + 15 * 13),
        ("back-propagation-60", 0, 0, 1024),
        ("hme-32-1-level", 32, 1, 32 * 52 + 31 * 13),
        ("hme-32-3-levels-a", 32, 1 + 4 + 16, 32 * 52 + 31 * 13),
        ("hme-32-3-levels-b", 32, 1 + 2 + 8, 32 * 52 + 31 * 13),
        ("hme-32-5-levels", 32, 31, 32 * 52 + 31 * 13),
        ("hme-64-6-levels", 64, 63, 64 * 52 + 63 * 13),
    ],
)
def test_published_systems_have_the_paper_s_experts_and_gates(
    name: str, experts: int, gates: int, parameters: int
):
    settings = FILE.PUBLISHED[name]
    model = FILE.build(settings)
    assert FILE.free_parameters(settings) == parameters
    if not experts:
        assert isinstance(model, HiddenLayer)
        assert sum(p.numel() for p in model.parameters()) == parameters
        return
    assert isinstance(model, ExpertTree)
    assert model.num_experts == experts
    assert sum(level.weight.shape[0] for level in model.levels) == gates
    assert len(FILE.PUBLISHED) == 7


def test_the_tree_and_the_net_have_about_as_many_parameters():
    tree, net = (FILE.free_parameters(FILE.PUBLISHED[name]) for name in ("hme-16", "back-propagation-60"))
    assert (tree, net) == (1027, 1024)


@pytest.mark.parametrize(
    "changes",
    [{}, {"branching": ()}, {"squash": "softmax"}, {"squash": "logistic", "branching": (3,)}],
)
def test_steps_up_the_gradient_raise_the_likelihood(changes: dict[str, Any]):
    settings = FILE.Settings(width=3, num_outputs=2, **changes)
    model = drawn(lambda: FILE.build(settings), 0)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(30, 3, generator=draw, dtype=torch.float64)
    y = torch.nn.functional.one_hot((x[:, 0] > 0).long(), 2).double()
    totals = []
    for _ in range(15):
        total = FILE.objective(settings)(model(x), y).total
        totals.append(total.item())
        for p, g in zip(
            model.parameters(), torch.autograd.grad(total, list(model.parameters())), strict=True
        ):
            p.data -= 0.003 * g
    assert totals == sorted(totals, reverse=True)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="width 0; allowed: 1 or more"):
        FILE.build(FILE.Settings(width=0))
    with pytest.raises(UserError, match=r"branching \(1,\); allowed"):
        FILE.build(FILE.Settings(branching=(1,)))
