"""Selective precision: matmuls in bf16 where asked for, routers in their own dtype, weights and optimizer
in fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from gatewright.parts import Router

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context that the forward pass runs in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def set_router_dtype(model: nn.Module, router_dtype: str) -> None:
    """Make every router of `model` compute in `router_dtype` ("fp32" or "bf16"); parameters keep their
    dtype.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.dtype = DTYPES[router_dtype]
