"""A model as it is asked, not trained: nothing is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from gatewright.parts import MoELayer


@contextmanager
def for_generation(model: nn.Module, layers: Sequence[MoELayer]) -> Iterator[None]:
    """Evaluation mode and no capacity for one call; who stops in the middle finds the model as it was."""
    capacities = [layer.capacity for layer in layers]
    was_training = model.training
    try:
        if was_training:
            model.eval()
        for layer in layers:
            layer.capacity = None
        yield
    finally:
        for layer, capacity in zip(layers, capacities, strict=True):
            layer.capacity = capacity
        if was_training:
            model.train()
