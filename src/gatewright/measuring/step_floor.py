"""What each part of a training step would take if it did nothing but its matmuls, or moved nothing but its
data, whichever is longer.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from gatewright.backbones import Cost, Decoder, count_cost
from gatewright.backbones.attention import Attention
from gatewright.backbones.latent import LatentAttention
from gatewright.backbones.transformer import Block
from gatewright.measuring.grid import DTYPES, Dtype
from gatewright.measuring.roofline import Machine
from gatewright.parts import MoELayer

PASSES = 3  # the forward matmul, and one for each of its two gradients
# What fused clipping and AdamW move per number: the gradient for its norm; then gradient, weight and both
# moments read, weight and both moments written. The averaged copy is read and written.
OPTIMIZER_NUMBERS, AVERAGE_NUMBERS = 8, 2


class Work(NamedTuple):
    """FLOPs of matmuls, bytes moved, and the dtype that the matmuls run in."""

    flops: float
    moved: float
    dtype: Dtype


def work_of_parts(model: Decoder, tokens: int, dtype: Dtype, *, averaged: bool) -> dict[str, Work]:
    """Return the Work of each part of one step on `tokens` tokens; parts that the model lacks have none.

    Bytes are those of tensors that pass between parts (each read or written once per pass), of weights (read
    forward and backward, gradients written) and of the optimizer's state; what stays inside a part costs
    nothing here. FLOPs are `count_cost`'s, three times.
    """
    cost: Cost = count_cost(model, model.context)
    wide, narrow = 4, DTYPES[dtype].itemsize
    width, vocab, layers = model.width, model.vocab_size, len(model.layers)
    heads = sum(_between_projections(m) for m in model.modules()) // 2
    weights = _weights(model)
    experts = sum(m.num_experts for m in model.modules() if isinstance(m, MoELayer))
    sparse = sum(isinstance(m, MoELayer) for m in model.modules())
    across = 2 * PASSES * tokens * width * narrow  # x in, y out, and back

    moved: dict[str, float] = {
        "embedding": wide * (3 * tokens * width + vocab * width),
        # A sum and its norm: two read, two written, and as much on the way back.
        "norms": 8 * wide * tokens * width * (2 * layers + 1),
        "projections": PASSES
        * (tokens * narrow * 2 * (heads + layers * width) + wide * weights["projections"]),
        "attention": PASSES * tokens * narrow * 2 * heads,
        "router": PASSES * wide * tokens * (sparse * width + experts),
        "experts": sparse * across + PASSES * wide * weights["experts"],
        "shared_experts": across * bool(weights["shared_experts"])
        + PASSES * wide * weights["shared_experts"],
        "dense_ffn": (layers - sparse) * across + PASSES * wide * weights["dense_ffn"],
        "head": PASSES * (tokens * narrow * (vocab + width) + wide * weights["head"]),
        "loss": PASSES * tokens * vocab * narrow,
        "optimizer": wide * cost.total_parameters * (OPTIMIZER_NUMBERS + AVERAGE_NUMBERS * averaged),
    }
    flops = dict.fromkeys(moved, 0.0) | {
        {"attention_projections": "projections", "attention_scores": "attention"}.get(part, part): count
        for part, count in cost.flops.items()
    }
    found = {
        part: Work(PASSES * tokens * flops[part], moved[part], "fp32" if part == "router" else dtype)
        for part in moved
    }
    needless = {part for part in ("router", "experts", "shared_experts", "dense_ffn") if not flops[part]}
    return {part: work for part, work in found.items() if part not in needless}


def _between_projections(module: nn.Module) -> int:
    """Return the numbers per token of queries, keys, values and what attention returns."""
    if isinstance(module, LatentAttention):
        sizes = module.sizes
        return 2 * module.num_heads * (sizes.head_dim + sizes.rotary_dim + sizes.value_dim)
    if isinstance(module, Attention):
        return 2 * (module.num_heads + module.num_kv_heads) * module.head_dim
    return 0


def _weights(model: Decoder) -> dict[str, int]:
    """Return the numbers that each part's weights hold."""
    held = dict.fromkeys(("projections", "experts", "shared_experts", "dense_ffn"), 0)
    for block in (layer for layer in model.layers if isinstance(layer, Block)):
        held["projections"] += sum(p.numel() for p in block.attention.parameters() if p.dim() > 1)
        layer = block.feed_forward
        if isinstance(layer, MoELayer):
            held["experts"] += _numbers(layer.experts)
            held["shared_experts"] += 0 if layer.shared is None else _numbers(layer.shared)
        else:
            held["dense_ffn"] += _numbers(layer)
    return held | {"head": model.head.weight.numel()}


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def floor_seconds(work: Work, machine: Machine) -> float:
    """Return the longer of the matmuls at the measured rate and the bytes at copying speed."""
    return max(work.flops / machine.flops[work.dtype].median, work.moved / machine.bandwidth.median)
