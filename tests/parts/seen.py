"""Stats of chosen logits, for tests of losses: layers whose logits are their input."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gatewright.parts import Stats
from tests.parts.harness import seen_layer


def stats_of(logits: list[list[float]] | Tensor, num_selected: int = 1, **options: object) -> Stats:
    """Return the Stats of a layer that sees exactly these logits [T, E] or [B, S, E]; `mask` is an option."""
    x = torch.as_tensor(logits, dtype=torch.float64)
    mask = options.pop("mask", None)
    return seen_layer(x.shape[-1], num_selected, weights="raw", **options)(x, mask)[1]


def with_sums(stats: Stats, **sums: Tensor) -> Stats:
    """Return Stats whose every router keeps these sums."""
    return Stats({name: dataclasses.replace(record, sums=sums) for name, record in stats.items()})


def layers_of(*batches: Tensor, num_selected: int = 1, **options: object) -> Stats:
    """Return the Stats of several layers, each seeing its own logits."""
    merged = Stats()
    for i, logits in enumerate(batches):
        merged = merged | stats_of(logits, num_selected, **options).under(f"layers.{i}")
    return merged


def softmax(logits: Tensor) -> Tensor:
    """Return exp(l) / sum exp(l) by row."""
    return logits.exp() / logits.exp().sum(dim=-1, keepdim=True)


def random_logits(*shape: int, seed: int = 0, skew: float = 0.3) -> Tensor:
    """Return logits with some imbalance."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=draw) + torch.arange(shape[-1]) * skew
