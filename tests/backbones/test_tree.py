"""A tree of gates over experts: its equations in loops, the order of paths, and what it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from gatewright.backbones import ExpertTree
from gatewright.backbones.tree import join
from gatewright.errors import UserError
from gatewright.training.seeded import drawn


def built(branching: tuple[int, ...], squash: str = "linear", outputs: int = 2) -> ExpertTree:
    return drawn(lambda: ExpertTree(3, branching, outputs, squash, init=1.0, gate_init=1.0), 0)


def softmax(values: list[float]) -> list[float]:
    top = [math.exp(v) for v in values]
    return [v / sum(top) for v in top]


@pytest.mark.parametrize("branching", [(2, 2), (3,), (2, 3, 2)])
def test_the_tree_is_the_equations_in_loops(branching: tuple[int, ...]):
    tree = built(branching)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = tree(x)
    weight, bias = tree.experts.weight.tolist(), tree.experts.bias.tolist()
    for t, case in enumerate(x.tolist()):
        blend = [0.0, 0.0]
        for expert, path in enumerate(itertools.product(*(range(b) for b in branching))):
            g, node = 1.0, 0
            for level, branch in enumerate(path):
                own = tree.levels[level]
                rows = [
                    sum(w * v for w, v in zip(row, case, strict=True)) + b
                    for row, b in zip(own.weight[node].tolist(), own.bias[node].tolist(), strict=True)
                ]
                g *= softmax(rows)[branch]
                node = node * branching[level] + branch
            assert found.logits[t, expert].exp().item() == pytest.approx(g, rel=1e-12)
            mu = [
                sum(w * v for w, v in zip(weight[expert][c], case, strict=True)) + bias[expert][c]
                for c in (0, 1)
            ]
            assert found.outputs[t, expert].tolist() == pytest.approx(mu, rel=1e-12)
            blend = [b + g * m for b, m in zip(blend, mu, strict=True)]
        assert found.blend[t].tolist() == pytest.approx(blend, rel=1e-12)


def test_paths_join_from_the_root():
    top = torch.tensor([[[-1.0, -2.0]]])
    below = torch.tensor([[[-10.0, -20.0, -30.0], [-40.0, -50.0, -60.0]]])
    assert join([top, below]).tolist() == [[-11.0, -21.0, -31.0, -42.0, -52.0, -62.0]]


def test_gates_share_out_the_whole():
    logits = built((2, 2, 2), "softmax")(torch.randn(5, 3, dtype=torch.float64)).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branching": ()}, r"branching \(\); allowed: one number of branches per level"),
        ({"branching": (2, 1)}, r"branching \(2, 1\)"),
        ({"squash": "logistics"}, "did you mean 'logistic'"),
        ({"init": 0.0}, "init 0.0; allowed: above 0"),
        ({"gate_init": -1.0}, "gate_init -1.0; allowed: 0 or more"),
    ],
)
def test_trees_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        ExpertTree(3, **changes)
