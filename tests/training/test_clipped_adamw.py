"""The optimizer of a run: torch's state by torch's names, clipping, averages, and experts that may rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewright.papers import get_paper
from gatewright.parts import MLP, Experts, MoELayer
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.training import TrainRun
from gatewright.training.checkpoint import optimizer_tensors, restore_optimizer
from gatewright.training.optimizer import AveragedWeights, ClippedAdamW, build_adamw, expert_slices
from tests.training.runs import fixed_trainer

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def layer() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))


def give_gradients(module: nn.Module, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def names_of(module: nn.Module) -> dict[Tensor, str]:
    return {p: n for n, p in module.named_parameters()}


def test_torch_s_checkpoints_are_read_and_written():
    old, new = layer(), layer()
    theirs = torch.optim.AdamW(old.parameters(), fused=True, **SETTINGS)
    ours = ClippedAdamW(new.parameters(), clip=1.0, **SETTINGS)
    for step in range(3):
        give_gradients(old, step)
        nn.utils.clip_grad_norm_(old.parameters(), 1.0)
        theirs.step()
    new.load_state_dict(old.state_dict())
    restore_optimizer(ours, names_of(new), optimizer_tensors(theirs, names_of(old)))
    for step in range(3, 6):
        for module in (old, new):
            give_gradients(module, step)
        nn.utils.clip_grad_norm_(old.parameters(), 1.0)
        theirs.step()
        ours.step()
    mine, true = optimizer_tensors(ours, names_of(new)), optimizer_tensors(theirs, names_of(old))
    assert mine.keys() == true.keys()
    for name, value in mine.items():
        assert (value.dtype, value.shape) == (true[name].dtype, true[name].shape)
        torch.testing.assert_close(value, true[name], rtol=2e-6, atol=2e-6)
    for a, b in zip(new.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    theirs.load_state_dict(ours.state_dict())
    assert [float(s["step"]) for s in theirs.state.values()] == [6.0] * 4


@pytest.mark.parametrize(("largest", "share"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_clipping_scales_to_the_largest_norm(largest: float, share: float):
    # 3, 4: norm 5. The first moment is (1 - beta1) times the clipped gradient.
    own = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    own[0].grad, own[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer = ClippedAdamW(own, clip=largest, **SETTINGS)
    assert float(optimizer.total_norm()) == 5.0
    optimizer.step()
    found = [float(optimizer.state[p]["exp_avg"]) for p in own[:2]]
    assert found == pytest.approx([0.1 * 3.0 * share, 0.1 * 4.0 * share], rel=1e-5)
    assert own[2].item() == 0.0
    assert not optimizer.state[own[2]]


def everything(module: nn.Module, optimizer: ClippedAdamW, average: AveragedWeights) -> list[Tensor]:
    state = optimizer_tensors(optimizer, names_of(module)).values()
    return [p.detach() for p in module.parameters()] + list(state) + average.values


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_touches_nothing(bad: float):
    module = layer()
    average = AveragedWeights(module, 0.9)
    optimizer = ClippedAdamW(module.parameters(), clip=1.0, average=average, **SETTINGS)
    give_gradients(module, 0)
    optimizer.step()
    held = copy.deepcopy(everything(module, optimizer, average))
    give_gradients(module, 1)
    next(module.parameters()).grad[0, 0] = bad  # type: ignore[index]
    optimizer.step()
    now = everything(module, optimizer, average)
    assert all(torch.equal(a, b) for a, b in zip(now, held, strict=True))
    assert average.updates == 1


def test_the_average_of_a_weight_without_gradient_moves_too():
    module = layer()
    average = AveragedWeights(module, 0.9)
    optimizer = ClippedAdamW(module.parameters(), average=average, **SETTINGS)
    other = AveragedWeights(module, 0.9)
    for step in range(3):
        give_gradients(module, step)
        still = list(module.parameters())[2]
        still.grad = None
        with torch.no_grad():
            still += 1.0
        optimizer.step()
        other.update()
    assert average.updates == 3
    for a, b in zip(average.values, other.values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_narrow_copies_follow_the_weights():
    module = layer()
    optimizer = ClippedAdamW(module.parameters(), narrow=True, **SETTINGS)
    give_gradients(module, 0)
    optimizer.step()
    assert all(torch.equal(optimizer.narrowed[p], p.detach().bfloat16()) for p in module.parameters())


def test_expert_slices_are_those_of_experts_alone():
    members = [MoELayer(8, 3, 1, 4, weights="raw"), MLP(8, 16)]
    outer = MoELayer(8, 2, 2, 4, experts=ModuleExperts(members), num_shared_experts=1)
    names = {name: expert_slices(outer).get(p, 0) for name, p in outer.named_parameters()}
    inner = {name: slices for name, slices in names.items() if "members.0.experts" in name}
    assert set(inner.values()) == {3}
    single = {name for name, slices in names.items() if slices == 1}
    assert single == {name for name in names if "members." in name} - inner.keys()
    assert {name for name, slices in names.items() if not slices} == {
        name for name in names if name.startswith(("router", "shared"))
    }
    assert set(expert_slices(Experts(8, 5, 4, bias=True)).values()) == {5}


def test_a_run_s_experts_rest_exactly_when_no_token_of_the_step_chose_them():
    few = {"num_experts": 24, "batch_tokens": 32, "accumulation": 2, "ema": 0.0, "log_every": 99}
    trainer = fixed_trainer(4, idle_experts="skip", **few)
    rested = 0
    for _ in range(3):
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.history.recent["routers"] = {}
        trainer.advance()
        for name, parameter in trainer.model.named_parameters():
            moved = (parameter != before[name]).flatten(1).any(1) if parameter.ndim > 1 else True
            if ".experts." not in name:
                assert torch.as_tensor(moved).any(), name
                continue
            router = f"layers.{name.split('.')[1]}.router"
            counts = torch.tensor(trainer.history.recent["routers"][router]["counts"])
            assert torch.equal(torch.as_tensor(moved), counts > 0), name
            rested += int((counts == 0).sum())
    assert rested
    steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {3.0}


def test_without_the_option_every_expert_moves():
    run = TrainRun()
    model = get_paper("mixtral").build(get_paper("mixtral").Settings())
    assert build_adamw(model, run, 0.1).slices == {}
    trainer = fixed_trainer(1, num_experts=24, batch_tokens=32)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".experts." in n}
    trainer.advance()
    now = dict(trainer.model.named_parameters())
    assert all((now[n] != held).flatten(1).any(1).all() for n, held in before.items())
