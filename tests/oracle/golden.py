"""Golden curves: the oracle trains two tiny models for 20 steps in fp64; golden.json holds every number.

Run from the repository's root after a change of the oracle (never to make a failing test pass):
    python -m tests.oracle.golden

Both models are h = x + MoE(x), out = W_head h, on 20 tokens of which each step sees 10. The total adds
the balance loss and the z-loss. `classifier`: cross-entropy, K = 2 renormalised SwiGLU experts and a
shared one, plain gradient descent. `regressor`: mean square error, K = 1 raw ReLU experts with capacity,
AdamW.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from tests.oracle import moe

FILE = Path(__file__).with_name("golden.json")
STEPS, TOKENS, BATCH, WIDTH, EXPERTS, HIDDEN, OUT = 20, 20, 10, 4, 5, 3, 3
COMMON = {"num_experts": EXPERTS, "expert_width": HIDDEN, "balance_weight": 0.05, "z_weight": 0.01}
RUNS: dict[str, dict[str, object]] = {
    "classifier": COMMON
    | {"num_selected": 2, "weights": "renormalised", "activation": "swiglu", "num_shared_experts": 1}
    | {"capacity_factor": None, "optimizer": "sgd", "learning_rate": 0.5},
    "regressor": COMMON
    | {"num_selected": 1, "weights": "raw", "activation": "relu", "num_shared_experts": 0}
    | {"capacity_factor": 1.0, "optimizer": "adamw", "learning_rate": 0.05, "weight_decay": 0.1},
}
BETAS, EPSILON = (0.9, 0.95), 1e-8


def numbers(*shape: int, phase: float, scale: float = 1.0) -> Tensor:
    """Return numbers without a pattern that a small model could miss, the same on every machine."""
    count = math.prod(shape)
    values = [scale * math.sin(phase + 1.7 * i + 0.013 * i * i) for i in range(count)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def start(settings: dict[str, object]) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """Return (parameters by name, inputs [20, D], labels)."""
    rows = HIDDEN * (2 if settings["activation"] == "swiglu" else 1)
    parameters = {
        "router": numbers(EXPERTS, WIDTH, phase=0.3),
        "w_in": numbers(EXPERTS, rows, WIDTH, phase=0.7),
        "w_down": numbers(EXPERTS, WIDTH, HIDDEN, phase=1.1),
        "head": numbers(OUT, WIDTH, phase=1.9, scale=0.5),
    }
    if settings["num_shared_experts"]:
        parameters["shared_in"] = numbers(rows, WIDTH, phase=2.3)
        parameters["shared_down"] = numbers(WIDTH, HIDDEN, phase=2.9)
    return parameters, numbers(TOKENS, WIDTH, phase=0.1), [(7 * t * t + t) % OUT for t in range(TOKENS)]


def batch(step: int) -> list[int]:
    """Return the tokens that a step sees."""
    return [(3 * step + i) % TOKENS for i in range(BATCH)]


def task_loss(name: str, out: Tensor, labels: list[int]) -> Tensor:
    """Return the mean cross-entropy, or the mean square error against the label's one-hot row."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(out, labels, strict=True):
        values = list(row)
        if name == "classifier":
            total = total + moe.log_sum_exp(values) - values[label]
        else:
            for i, value in enumerate(values):
                total = total + (value - float(i == label)) ** 2 / OUT
    return total / len(labels)


def update(
    settings: dict[str, object], values: list[Tensor], grads: list[Tensor], state: list[dict], step: int
) -> None:
    """Change the parameters in place: gradient descent, or AdamW (Loshchilov and Hutter, algorithm 2)."""
    rate = float(str(settings["learning_rate"]))
    for value, grad, memory in zip(values, grads, state, strict=True):
        if settings["optimizer"] == "sgd":
            value -= rate * grad
            continue
        memory["m"] = BETAS[0] * memory.get("m", 0) + (1 - BETAS[0]) * grad
        memory["v"] = BETAS[1] * memory.get("v", 0) + (1 - BETAS[1]) * grad**2
        m = memory["m"] / (1 - BETAS[0] ** (step + 1))
        v = memory["v"] / (1 - BETAS[1] ** (step + 1))
        value -= rate * float(str(settings["weight_decay"])) * value
        value -= rate * m / (v**0.5 + EPSILON)


def train(name: str, steps: int = STEPS) -> dict[str, object]:
    """Return settings, data and start, then per step the losses and the experts' loads, then the end."""
    settings = RUNS[name]
    parameters, inputs, labels = start(settings)
    first = {key: value.tolist() for key, value in parameters.items()}
    values = [value.requires_grad_() for value in parameters.values()]
    state: list[dict] = [{} for _ in values]
    curve: list[dict[str, object]] = []
    for step in range(steps):
        ids = batch(step)
        x = inputs[ids]
        weights = moe.Weights(
            *(parameters[key] for key in ("router", "w_in", "w_down")),
            parameters.get("shared_in"),
            parameters.get("shared_down"),
        )
        y, record = moe.moe_layer(
            x,
            weights,
            int(str(settings["num_selected"])),
            form=str(settings["weights"]),
            activation=str(settings["activation"]),
            capacity_factor=settings["capacity_factor"],  # type: ignore[arg-type]
        )
        out = torch.stack([torch.stack([moe.dot(row, h) for row in parameters["head"]]) for h in x + y])
        task = task_loss(name, out, [labels[t] for t in ids])
        balance, z = moe.balance_loss([record]), moe.z_loss([record])
        total = task + COMMON["balance_weight"] * balance + COMMON["z_weight"] * z
        grads = torch.autograd.grad(total, values)
        losses = {"total": total, "task": task, "balance": balance, "z": z}
        curve.append({key: value.item() for key, value in losses.items()})
        curve[-1] |= {"counts": record.counts, "kept": record.kept}
        with torch.no_grad():
            update(settings, values, list(grads), state, step)
    end = {key: value.tolist() for key, value in parameters.items()}
    return {
        "settings": settings,
        "inputs": inputs.tolist(),
        "labels": labels,
        "batches": [batch(step) for step in range(steps)],
        "start": first,
        "curve": curve,
        "end": end,
    }


def main() -> None:
    """Write golden.json, one field a line."""
    runs = []
    for name in RUNS:
        fields = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in train(name).items()]
        runs.append(f" {json.dumps(name)}: {{\n" + ",\n".join(fields) + "\n }")
    FILE.write_text("{\n" + ",\n".join(runs) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
