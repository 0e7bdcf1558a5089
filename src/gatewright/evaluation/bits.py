"""Bits per byte on held-out text, per domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Bits:
    """`bits_per_byte` over all evaluated text, and per domain; `num_bytes` evaluated, `nats_per_token`
    over all.
    """

    bits_per_byte: float
    domains: dict[str, float]
    num_bytes: int
    nats_per_token: float


def take_bytes(tokens: np.ndarray, byte_lengths: np.ndarray, num_bytes: int) -> np.ndarray:
    """Return the shortest prefix of `tokens` that stands for at least `num_bytes` bytes of text (all, if
    there are fewer).
    """
    ends = np.cumsum(byte_lengths[tokens])
    return tokens[: int(np.searchsorted(ends, num_bytes)) + 1]


def bits_per_byte(
    model: nn.Module,
    texts: Mapping[str, np.ndarray],
    byte_lengths: np.ndarray,
    *,
    context: int,
    batch_size: int,
    autocast: AbstractContextManager[object] | None = None,
) -> Bits:
    """Return the model's bits per byte on each domain's tokens.

    Each text is cut into windows of `context` predictions; every token but a text's first is predicted once.
    Bits per byte = sum of -log2 p(token) / bytes of text those tokens stand for (an end-of-text id costs bits
    and stands for no byte). The model is left in the mode that it was found in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats: dict[str, float] = {}
    sizes: dict[str, int] = {}
    count = 0
    with torch.no_grad():
        for domain, tokens in texts.items():
            total = torch.zeros((), dtype=torch.float64)
            for inputs, targets in _windows(tokens, context, batch_size):
                with autocast or nullcontext():
                    logits = model(inputs.to(device)).logits
                losses = F.cross_entropy(
                    logits.float().flatten(0, 1),
                    targets.to(device).flatten(),
                    reduction="sum",
                )
                total += losses.double().cpu()
            nats[domain], sizes[domain] = float(total), int(byte_lengths[tokens[1:]].sum())
            count += max(len(tokens) - 1, 0)
    model.train(was_training)
    per_domain = {d: nats[d] / math.log(2) / max(sizes[d], 1) for d in texts}
    num_bytes = sum(sizes.values())
    return Bits(
        sum(nats.values()) / math.log(2) / max(num_bytes, 1),
        per_domain,
        num_bytes,
        sum(nats.values()) / max(count, 1),
    )


def _windows(tokens: np.ndarray, context: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut into [batch, context] inputs and targets; what is left over is a last window of its own length.

    Padding it would change how many tokens an expert with a capacity may take.
    """
    flat = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    rows, rest = divmod(max(flat.shape[0] - 1, 0), context)
    places = torch.arange(rows * context).view(rows, context)
    batches = list(places.split(batch_size)) if rows else []
    if rest:
        batches.append(torch.arange(rows * context, rows * context + rest)[None])
    return [(flat[place], flat[place + 1]) for place in batches]
