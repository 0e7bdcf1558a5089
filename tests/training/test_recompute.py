"""Recomputed blocks: the same bits in losses, weights, counts and rules' state, noise included."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gatewright.backbones import Decoder
from gatewright.errors import UserError
from gatewright.objectives import NextToken
from gatewright.parts import MoELayer
from gatewright.training import TrainRun
from gatewright.training import trainer as training
from tests.training.runs import advance, digest, fixed_trainer


@dataclasses.dataclass(frozen=True)
class Settings:
    """A decoder with any router."""

    vocab_size: int = 257
    context: int = 16
    router: str = "token_choice"
    dropout: float = 0.0


def build(settings: Settings) -> nn.Module:
    layers = [
        MoELayer(16, 4, 2, 8, router=settings.router, expert_dropout=settings.dropout) for _ in range(2)
    ]
    return Decoder(settings.vocab_size, 16, 2, layers, context=settings.context)


@pytest.fixture(autouse=True)
def any_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the paper that a run names."""
    paper = SimpleNamespace(
        Settings=Settings, build=build, objective=lambda settings: NextToken(balance_weight=0.01)
    )
    monkeypatch.setattr(training, "get_trained_paper", lambda name: paper)


CASES: list[dict[str, Any]] = [
    {"router": "token_choice", "accumulation": 2, "balance_scope": "global_batch"},
    {"router": "token_choice", "precision": "bf16", "accumulation": 2, "balance_scope": "global_batch"},
    {"router": "token_choice", "dropout": 0.4},
    {"router": "gshard"},
    {"router": "vmoe", "precision": "bf16"},
    {"router": "sampled", "accumulation": 2},
    {"router": "loss_free"},
    {"router": "remoe"},
    {"router": "expert_choice", "balance_scope": "sequence"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_recomputed_blocks_change_no_bit(case: dict[str, Any]):
    given = dict(case)
    model = Settings(router=given.pop("router"), dropout=given.pop("dropout", 0.0))
    plain = fixed_trainer(model=model, **given)
    again = fixed_trainer(model=model, recompute="blocks", **given)
    assert advance(plain, 3) == advance(again, 3)
    # History holds what routers counted: each token once, however often its block was computed.
    assert digest(plain.checkpoint()) == digest(again.checkpoint())


def kept_inside(trainer: Any) -> int:
    """Return how many numbers the graph of one forward pass keeps for its backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    tokens = torch.zeros(4, 16, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = trainer.model(tokens, key=torch.tensor(3))
    assert output.logits.requires_grad
    weights = {p.data_ptr() for p in trainer.model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


def test_recomputed_blocks_keep_less():
    plain, again = fixed_trainer(model=Settings()), fixed_trainer(model=Settings(), recompute="blocks")
    assert kept_inside(again) < 0.5 * kept_inside(plain)


def test_nothing_is_recomputed_without_gradients_or_with_a_cache(monkeypatch: pytest.MonkeyPatch):
    trainer = fixed_trainer(model=Settings(), recompute="blocks")
    monkeypatch.setattr("gatewright.backbones.transformer.checkpoint", None)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        plain = trainer.model(tokens).logits
    cached = trainer.model(tokens, trainer.model.new_cache(1)).logits
    torch.testing.assert_close(cached, plain)


def test_an_unknown_word_is_one_line():
    with pytest.raises(UserError, match=r"recompute 'block' is unknown; did you mean 'blocks'.*none, blocks"):
        TrainRun(recompute="block")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"idle_experts 'skipp' is unknown.*allowed: adamw, skip"):
        TrainRun(idle_experts="skipp")  # type: ignore[arg-type]
