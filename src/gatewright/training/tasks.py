"""What a model is asked about text: the next token, or the spans that were masked; in training and after."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import Tensor, nn

from gatewright.evaluation import Bits, bits_per_byte, masked_bits_per_byte
from gatewright.objectives import SpanCorruption
from gatewright.parts.draws import fold

# The masks of a micro-batch have a key of their own, apart from noise and coins.
_SPANS = 0x7370616E


def ask(model: nn.Module, objective: Any, rows: Tensor, key: Tensor) -> tuple[Any, Tensor]:
    """Return the model's output on windows of text [B, context + 1], and the ids that its logits are about.

    The last token of a window is the first of the next one: spans are masked in the others.
    """
    text = rows[:, :-1]
    if isinstance(objective, SpanCorruption):
        pair = objective.pair(text, fold(key, _SPANS))
        return model(pair.source, pair.target, key=key), pair.labels
    return model(text, key=key), rows[:, 1:]


def bits_of(
    model: nn.Module,
    objective: Any,
    texts: Mapping[str, np.ndarray],
    byte_lengths: np.ndarray,
    *,
    context: int,
    batch_size: int,
    autocast: AbstractContextManager[object] | None = None,
) -> Bits:
    """Return bits per byte of all text (next token) or of the masked text (spans)."""
    more: Any = {"batch_size": batch_size, "autocast": autocast}
    if isinstance(objective, SpanCorruption):
        return masked_bits_per_byte(model, texts, byte_lengths, objective, **more)
    return bits_per_byte(model, texts, byte_lengths, context=context, **more)
