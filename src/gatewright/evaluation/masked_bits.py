"""Bits per byte of masked text: how an encoder-decoder that fills spans is judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.evaluation.bits import Bits
from gatewright.objectives import SpanCorruption, Spans
from gatewright.parts.draws import fold

_MASKS = 0x6D61736B


def masked_bits_per_byte(
    model: nn.Module,
    texts: Mapping[str, np.ndarray],
    byte_lengths: np.ndarray,
    objective: SpanCorruption,
    *,
    batch_size: int,
    autocast: AbstractContextManager[object] | None = None,
) -> Bits:
    """Return the model's bits per byte of masked text on each domain's tokens.

    Each text is cut into windows, the last one shorter, and each is masked by the objective, always at the
    same places. Bits per byte = sum over labels of -log2 p(label), sentinels and ends included, / bytes of
    text that the masked tokens stand for. No decoder's figure compares: it sees no text behind a token. The
    model is left in the mode that it was found in.
    """
    place = next(model.parameters()).device
    lengths = torch.from_numpy(np.asarray(byte_lengths, dtype=np.int64))
    was_training = model.training
    model.eval()
    nats: dict[str, float] = {}
    sizes: dict[str, int] = {}
    count = 0
    with torch.no_grad():
        for number, (domain, tokens) in enumerate(texts.items()):
            total, size = torch.zeros((), dtype=torch.float64), 0
            key = fold(torch.tensor(_MASKS), number)
            for rows, mask, spans in _windows(tokens, objective.spans, key, batch_size):
                pair = spans.corrupt(rows, mask)
                with autocast or nullcontext():
                    logits = model(pair.source.to(place), pair.target.to(place)).logits
                labels = pair.labels.to(place).flatten()
                losses = F.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum")
                total += losses.double().cpu()
                size += int(lengths[rows[mask]].sum())
                count += labels.numel()
            nats[domain], sizes[domain] = float(total), size
    model.train(was_training)
    num_bytes = sum(sizes.values())
    return Bits(
        sum(nats.values()) / math.log(2) / max(num_bytes, 1),
        {domain: nats[domain] / math.log(2) / max(sizes[domain], 1) for domain in texts},
        num_bytes,
        sum(nats.values()) / max(count, 1),
    )


def _windows(
    tokens: np.ndarray, spans: Spans, key: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Spans]]:
    """Yield windows [batch, length] with their masks and spans; the rest of a text is its last one.

    A window's mask depends on its number alone, not on the batches.
    """
    flat = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    rows, rest = divmod(flat.shape[0], spans.length)
    if rows:
        windows = flat[: rows * spans.length].view(rows, -1)
        masks = spans.mask(fold(key, 0), rows)
        for some, mask in zip(windows.split(batch_size), masks.split(batch_size), strict=True):
            yield some, mask, spans
    if rest > 1:
        own = dataclasses.replace(spans, length=rest)
        yield flat[-rest:].unsqueeze(0), own.mask(fold(key, 1), 1), own
