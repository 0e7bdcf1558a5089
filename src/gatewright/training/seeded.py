"""Models of cases drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def drawn(build: Callable[[], Model], seed: int) -> Model:
    """Return a model drawn from its seed, in fp64; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()
