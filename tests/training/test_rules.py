"""Routers with noise and with state, trained: keys follow the step, state is learned and saved."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gatewright.backbones import Decoder
from gatewright.objectives import NextToken
from gatewright.parts import MoELayer
from gatewright.parts.draws import fold
from gatewright.training import trainer as training
from gatewright.training.state import saved_buffers
from gatewright.training.trainer import Trainer
from tests.training.runs import advance, digest, fixed_trainer


@dataclasses.dataclass(frozen=True)
class Settings:
    """A decoder with any router."""

    vocab_size: int = 257
    context: int = 16
    router: str = "loss_free"


def build(settings: Settings) -> nn.Module:
    layers = [MoELayer(16, 4, 2, 8, router=settings.router) for _ in range(2)]
    return Decoder(settings.vocab_size, 16, 2, layers, context=settings.context)


@pytest.fixture(autouse=True)
def any_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the paper that a run names."""
    paper = SimpleNamespace(
        Settings=Settings, build=build, objective=lambda settings: NextToken(balance_weight=0.01)
    )
    monkeypatch.setattr(training, "get_trained_paper", lambda name: paper)


def trainer_of(router: str, **changes: Any) -> Trainer:
    return fixed_trainer(model=Settings(router=router), **changes)


@pytest.mark.parametrize("router", ["loss_free", "deepseek_v3", "remoe", "vmoe", "gshard", "sampled", "hash"])
def test_a_restored_run_goes_on_bit_for_bit(router: str):
    straight = trainer_of(router)
    advance(straight, 3)
    middle = copy.deepcopy(straight.checkpoint())
    advance(straight, 3)
    again = trainer_of(router)
    again.restore(middle)
    advance(again, 3)
    assert digest(again.checkpoint()) == digest(straight.checkpoint())


def test_biases_learn_once_per_step_from_the_counts_of_all_micro_batches():
    trainer = trainer_of("loss_free", accumulation=2)
    model = copy.deepcopy(trainer.model)
    advance(trainer, 1)
    batch = torch.from_numpy(trainer.stream.batch(0))
    for name, router in trainer.model.routers().items():
        counts = sum(model(rows[:, :-1]).stats[name].counts for rows in batch.split(2))
        assert torch.equal(router.rule.bias.bias, 1e-3 * torch.sign(counts.double().mean() - counts).float())
    assert all("bias" in name for name, _ in saved_buffers(trainer.model) if "rule" in name)
    assert len([name for name in trainer.checkpoint().tensors["model"] if "rule" in name]) >= 2


def test_a_skipped_step_teaches_no_rule(monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of("loss_free", on_nonfinite="skip")
    before = [b.clone() for _, b in saved_buffers(trainer.model)]
    monkeypatch.setattr(trainer.optimizer, "total_norm", lambda: torch.tensor(torch.nan))
    advance(trainer, 1)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, saved_buffers(trainer.model), strict=True))


def test_every_step_and_micro_batch_has_noise_of_its_own():
    trainer = trainer_of("sampled", accumulation=2)
    seen = []
    forward = trainer.model.forward

    def spy(tokens: torch.Tensor, key: torch.Tensor) -> Any:
        seen.append(int(key))
        return forward(tokens, key=key)

    trainer.model.forward = spy  # type: ignore[method-assign]
    advance(trainer, 2)
    assert seen == [int(fold(torch.tensor(0), step, place)) for step in (0, 1) for place in (0, 1)]
    assert len(set(seen)) == 4


def test_layers_do_not_share_their_noise():
    model = build(Settings(router="sampled"))
    with torch.no_grad():
        for layer in model.layers:
            layer.feed_forward.router.weight.zero_()
    stats = model(torch.zeros(1, 16, dtype=torch.int64), capture=True, key=torch.tensor(3)).stats
    first, second = (stats[f"layers.{i}.router"].experts for i in (0, 1))
    assert not torch.equal(first, second)


def test_the_global_batch_is_counted_over_the_micro_batches_of_a_step():
    # Micro-batch a sees f of micro-batches 1..a: the first its own, the second that of both.
    trainer = trainer_of("token_choice", accumulation=2, balance_scope="global_batch")
    batch = torch.from_numpy(trainer.stream.batch(0))
    trainer._gradients(batch)
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    counts: dict[str, Any] = {}
    for rows in batch.split(2):
        output = trainer.model(rows[:, :-1])
        for name, record in output.stats.items():
            counts[name] = counts.get(name, 0) + record.counts
        (trainer.objective(output, rows[:, 1:], counts).total / 2).backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, msg=name)
    micro = trainer_of("token_choice", accumulation=2)
    micro._gradients(batch)
    assert any(
        not torch.equal(found[n], p.grad) for n, p in micro.model.named_parameters() if p.grad is not None
    )
