"""Cost and initialisation of biased, free, gated and nested experts: against torch's counter, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewright.backbones import Decoder, count_cost
from gatewright.backbones.initialise import fan_in, normal
from gatewright.parts import MLP, Experts, MoELayer
from gatewright.parts.free_experts import FreeExperts
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.parts.shared import GatedShared
from tests.backbones.test_cost import LENGTH, counted, expected


def layers() -> dict[str, nn.Module]:
    """Return one feed-forward layer of each kind; all experts are chosen where the load could be uneven."""
    inner = [MoELayer(32, 4, 2, 8, backend="reference", num_shared_experts=1), MLP(32, 24, bias=True)]
    free = FreeExperts(Experts(32, 3, 16, bias=True), ("zero", "copy", "constant", "constant"))
    return {
        "biases": MoELayer(32, 8, 3, 16, backend="reference", num_shared_experts=2, expert_bias=True),
        "a gated shared expert": MoELayer(32, 4, 2, 16, backend="reference", shared=GatedShared(32, 24)),
        "free": MoELayer(32, 7, 7, 16, backend="reference", experts=free),
        "nested": MoELayer(32, 2, 2, 16, experts=ModuleExperts(inner)),
        "dense with biases": MLP(32, 16, "linear", bias=True),
        "dense and gated": GatedShared(32, 16, "clamped_swiglu"),
    }


@pytest.mark.parametrize("name", layers())
def test_a_decoder_costs_what_torch_counts(name: str):
    model = Decoder(64, 32, 4, [layers()[name]])
    assert counted(model) == pytest.approx(expected(model), rel=1e-12)


def test_biases_by_hand():
    # Width 8, 5 experts of 3 x 8 x 4 = 96 weights and 2 x 4 + 8 = 16 biases, 2 active; shared 96 + 16.
    model = Decoder(10, 8, 2, [MoELayer(8, 5, 2, 4, num_shared_experts=1, expert_bias=True)])
    cost = count_cost(model, context=9)
    assert cost.flops["experts"] == 2 * 2 * 96
    assert cost.flops["shared_experts"] == 2 * 96
    assert cost.total_parameters == sum(p.numel() for p in model.parameters())
    assert cost.total_parameters - cost.active_parameters == 3 * (96 + 16)


def test_free_experts_by_hand():
    # 3 feed-forward experts of 96 weights and 3 free ones, K = 2: at an even load 1 of 2 is feed-forward.
    # One constant expert: 2 x 8 weights for its shares and a vector of 8, met by every token.
    free = FreeExperts(Experts(8, 3, 4), ("zero", "copy", "constant"))
    cost = count_cost(Decoder(10, 8, 2, [MoELayer(8, 6, 2, 4, experts=free)]), context=9)
    assert cost.flops["experts"] == 2 * (96 + 24)
    assert cost.flops["router"] == 2 * 6 * 8
    assert cost.total_parameters - cost.active_parameters == 2 * 96


def test_layers_in_a_layer_by_hand():
    # 4 inner layers of 3 experts of 96 weights (K = 1 of each) and a router of 24; 2 inner layers chosen.
    inner = ModuleExperts([MoELayer(8, 3, 1, 4, weights="raw") for _ in range(4)])
    cost = count_cost(Decoder(10, 8, 2, [MoELayer(8, 4, 2, 4, experts=inner)]), context=9)
    assert cost.flops["experts"] == 2 * 2 * 96
    assert cost.flops["router"] == 2 * (4 * 8 + 2 * 24)
    # Idle: 2 whole inner layers, and 2 of 3 experts in each of the 2 that are met.
    assert cost.total_parameters - cost.active_parameters == 2 * (3 * 96 + 24) + 2 * 2 * 96


@pytest.mark.parametrize("draw", [normal, fan_in])
def test_biases_stay_zero_and_matrices_are_drawn(draw):
    torch.manual_seed(0)
    model = Decoder(64, 32, 4, list(layers().values()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and ".b_" not in name:
                parameter.fill_(7.0)
    draw(model)
    for name, parameter in model.named_parameters():
        if ".b_" in name:
            assert (parameter == 0).all(), name
        elif "norm" not in name:
            assert not (parameter == 7.0).any(), name
            assert abs(parameter.mean().item()) < 0.1 * max(parameter.std().item(), 1.0), name


def test_parameters_are_those_of_the_model():
    model = Decoder(64, 32, 4, list(layers().values()))
    assert count_cost(model, LENGTH).total_parameters == sum(p.numel() for p in model.parameters())
