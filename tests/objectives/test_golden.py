"""Golden curves: 20 steps trained by the library equal the oracle's, number for number."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.kernels import runnable_backends
from gatewright.objectives import NextToken
from gatewright.parts import MoELayer, balance_loss, z_loss
from tests.oracle import golden

RUNS: dict[str, Any] = json.loads(golden.FILE.read_text(encoding="utf-8"))
NEAR = {"rtol": 1e-10, "atol": 1e-10}


def build(run: dict[str, Any], backend: str) -> tuple[MoELayer, dict[str, Tensor]]:
    """Return the layer with the run's first parameters, and all of them by the oracle's names."""
    settings, start = run["settings"], run["start"]
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in start.items()}
    layer = MoELayer(
        given["router"].shape[1],
        settings["num_experts"],
        settings["num_selected"],
        settings["expert_width"],
        activation=settings["activation"],
        weights=settings["weights"],
        num_shared_experts=settings["num_shared_experts"],
        capacity_factor=settings["capacity_factor"],
        backend=backend,
    ).double()
    parameters: dict[str, Tensor] = {
        "router": layer.router.weight,
        "w_in": layer.experts.w_in,
        "w_down": layer.experts.w_down,
        "head": torch.nn.Parameter(torch.zeros_like(given["head"])),
    }
    if layer.shared is not None:
        parameters |= {"shared_in": layer.shared.w_in, "shared_down": layer.shared.w_down}
    assert parameters.keys() == given.keys()
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(given[name])
    return layer, parameters


def optimizer_of(settings: dict[str, Any], parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
    """Return torch's own optimizer with the run's settings."""
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(parameters.values(), lr=settings["learning_rate"])
    return torch.optim.AdamW(
        parameters.values(),
        lr=settings["learning_rate"],
        betas=golden.BETAS,
        eps=golden.EPSILON,
        weight_decay=settings["weight_decay"],
    )


@pytest.mark.parametrize("backend", runnable_backends())
@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_equal_the_oracles(name: str, backend: str):
    run = RUNS[name]
    settings = run["settings"]
    layer, parameters = build(run, backend)
    optimizer = optimizer_of(settings, parameters)
    inputs = torch.tensor(run["inputs"], dtype=torch.float64)
    labels = torch.tensor(run["labels"])
    objective = NextToken(settings["balance_weight"], settings["z_weight"])
    assert len(run["curve"]) == len(run["batches"]) == 20
    for ids, expected in zip(run["batches"], run["curve"], strict=True):
        y, stats = layer(inputs[ids])
        out = (inputs[ids] + y) @ parameters["head"].T
        if name == "classifier":
            loss = objective(SimpleNamespace(logits=out.unsqueeze(0), stats=stats), labels[ids].unsqueeze(0))
            total, task = loss.total, loss.task
        else:
            task = (out - torch.nn.functional.one_hot(labels[ids], out.shape[1])).square().mean()
            total = (
                task + settings["balance_weight"] * balance_loss(stats) + settings["z_weight"] * z_loss(stats)
            )
        found = {"total": total, "task": task, "balance": balance_loss(stats), "z": z_loss(stats)}
        for key, value in found.items():
            assert value.item() == pytest.approx(expected[key], rel=1e-10, abs=1e-12), key
        assert stats["router"].counts.tolist() == expected["counts"]
        assert stats["router"].kept.tolist() == expected["kept"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for key, value in parameters.items():
        torch.testing.assert_close(value.detach(), torch.tensor(run["end"][key], dtype=torch.float64), **NEAR)


@pytest.mark.parametrize("name", RUNS)
def test_the_stored_curve_is_the_oracles(name: str):
    again, stored = golden.train(name, steps=3), RUNS[name]
    assert again["settings"] == stored["settings"]
    assert again["start"] == stored["start"]
    for now, then in zip(again["curve"], stored["curve"][:3], strict=True):
        assert now["counts"] == then["counts"]
        for key in ("total", "task", "balance", "z"):
            assert now[key] == pytest.approx(then[key], rel=1e-12), key


@pytest.mark.parametrize("name", RUNS)
def test_the_curves_exercise_what_they_should(name: str):
    curve = RUNS[name]["curve"]
    assert curve[-1]["task"] < 0.6 * curve[0]["task"], "it learns"
    assert len({tuple(point["counts"]) for point in curve}) > 5, "the routing moves"
    if name == "regressor":
        assert any(point["counts"] != point["kept"] for point in curve), "something is dropped"
        assert any(0 in point["counts"] for point in curve), "an expert is empty"
