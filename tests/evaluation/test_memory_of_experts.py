"""What layers with every kind of expert keep for the backward pass, against what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gatewright.backbones import Decoder
from gatewright.evaluation.memory import training_memory
from gatewright.kernels import native
from gatewright.parts import MLP, Experts, MoELayer
from gatewright.parts.free_experts import FreeExperts
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.parts.shared import GatedShared
from tests.evaluation.test_plan import kept_bytes

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "biases": lambda: MoELayer(64, 8, 2, 96, expert_bias=True, activation="clamped_swiglu"),
    "dropout": lambda: MoELayer(64, 8, 2, 96, expert_dropout=0.3),
    "a gated shared expert": lambda: MoELayer(64, 8, 2, 96, shared=GatedShared(64, 96, "gelu")),
    "nested": lambda: MoELayer(
        64, 2, 2, 96, experts=ModuleExperts([MoELayer(64, 4, 2, 48), MLP(64, 48, "linear")])
    ),
    "dense, clamped, with biases": lambda: MLP(64, 96, "clamped_swiglu", bias=True),
    # All are chosen, so that the load is even.
    "free": lambda: MoELayer(64, 4, 4, 96, experts=FreeExperts(Experts(64, 2, 96), ("zero", "copy"))),
    "constant": lambda: MoELayer(
        64, 5, 5, 96, experts=FreeExperts(Experts(64, 2, 96), ("zero", "constant", "constant"))
    ),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_activations_match_what_autograd_keeps(name: str, dtype: str):
    torch.manual_seed(0)
    model = Decoder(100, 64, 4, [LAYERS[name]() for _ in range(3)])
    model = model.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    tokens = torch.randint(0, 100, (2, 128))
    measured = kept_bytes(lambda: model(tokens).logits, list(model.parameters()))
    formula = training_memory(model, dtype, context=128, batch=2, optimizer="sgd").activations
    # The loss is not run: its logits and their gradient; where torch computes it, what that keeps beside.
    each = 4 if dtype == "fp32" else 2
    loss = 100 * 2 * each + 4 if native.is_ready() else 100 * (each + 4 + 4)
    without_loss = formula - 256 * loss
    assert without_loss == pytest.approx(measured, rel=0.03)
