"""The cost count against torch's own counter of matmuls, against the model, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gatewright.backbones import Attention, Decoder, count_cost
from gatewright.errors import UserError
from gatewright.kernels import native
from gatewright.parts import MLP, MoELayer

BATCH, LENGTH = 2, 16


def counted(model: Decoder) -> int:
    """FLOPs that torch counts in one pass; its own plain operators, since it cannot see into fused ones."""
    plain = sdpa_kernel(SDPBackend.MATH)
    with native.left_out(), plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, model.vocab_size, (BATCH, LENGTH)))
    return counter.get_total_flops()


def expected(model: Decoder) -> float:
    """Our count of that pass; torch counts all S keys of a causal token, ours the (S + 1) / 2 it meets."""
    flops = count_cost(model, LENGTH).flops
    causal = flops["attention_scores"]
    return BATCH * LENGTH * (sum(flops.values()) - causal + causal * 2 * LENGTH / (LENGTH + 1))


@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_a_dense_decoder_costs_what_torch_counts(num_kv_heads: int, activation: str):
    layers = [MLP(32, 48, activation), MLP(32, 80, activation)]
    model = Decoder(64, 32, 4, layers, num_kv_heads=num_kv_heads, head_dim=16, tie_embeddings=True)
    assert counted(model) == pytest.approx(expected(model), rel=1e-12)


def test_a_sparse_decoder_costs_what_torch_counts():
    layers = [
        MLP(32, 48),
        MoELayer(32, 8, 3, 16, backend="reference", num_shared_experts=2),
        MoELayer(32, 4, 1, 24, weights="raw", activation="gelu", backend="reference"),
    ]
    model = Decoder(64, 32, 4, layers)
    assert counted(model) == pytest.approx(expected(model), rel=1e-12)


def test_a_mixture_by_hand():
    # Width 8, 5 experts of 3 x 8 x 4 = 96 weights, 2 active, a shared expert of 96, router 5 x 8 = 40.
    layer = MoELayer(8, 5, 2, 4, num_shared_experts=1)
    cost = count_cost(Decoder(10, 8, 2, [layer]), context=9)
    assert cost.flops["experts"] == 2 * 2 * 96
    assert cost.flops["shared_experts"] == 2 * 96
    assert cost.flops["router"] == 2 * 40
    assert cost.flops["head"] == 2 * 10 * 8
    assert cost.flops["dense_ffn"] == 0
    # Four projections of 8 x 8; scores and mix over 5 keys on average, 2 heads x 4 numbers.
    assert cost.flops["attention_projections"] == 2 * 4 * 64
    assert cost.flops["attention_scores"] == 2 * 2 * 8 * 5
    assert cost.train_flops_per_token == 3 * cost.forward_flops_per_token == 3 * sum(cost.flops.values())
    # Embedding and head 80 each, attention 256, three norms of 8, router 40, shared 96, experts 480.
    assert cost.total_parameters == 2 * 80 + 256 + 3 * 8 + 40 + 96 + 480
    assert cost.total_parameters - cost.active_parameters == 3 * 96


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parameters_are_those_of_the_model(tie_embeddings: bool):
    layers = [MLP(32, 48), MoELayer(32, 8, 8, 16)]
    model = Decoder(64, 32, 4, layers, qk_norm="width", tie_embeddings=tie_embeddings)
    cost = count_cost(model, LENGTH)
    assert cost.total_parameters == sum(p.numel() for p in model.parameters())
    # With K = E every parameter is active.
    assert cost.active_parameters == cost.total_parameters


def test_counting_needs_no_memory():
    with torch.device("meta"):
        layers = [MoELayer(1024, 64, 8, 4096) for _ in range(2)]
        model = Decoder(1000, 1024, 8, layers)
    assert count_cost(model, 10).total_parameters > 1.6e9


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
@pytest.mark.parametrize("chunked", [False, True])
def test_keys_met_are_those_that_positions_see(window: int | None, chunked: bool):
    attention = Attention(8, 2, 2, 4, window=window, chunked=chunked)
    for context in (1, 6, 7, 12):
        limit = window or context
        met = [position % limit + 1 if chunked else min(position + 1, limit) for position in range(context)]
        assert attention.keys_met(context) == pytest.approx(sum(met) / context)


def test_another_model_is_refused():
    with pytest.raises(UserError, match="Linear is not known"):
        count_cost(nn.Linear(2, 2), 4)
