"""Dense layers of unequal widths as layers of one: hidden units of zeros, which add nothing to any output."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.backbones import Decoder
from gatewright.parts import MLP


def even_widths(settings: Any, model: Decoder) -> tuple[Any, int]:
    """Return the settings with one width for all dense layers, and how many hidden units that took; the
    model's narrower layers are widened in place. A twin of equal FLOPs has such layers, released
    architectures do not.
    """
    dense = [block.feed_forward for block in model.layers if isinstance(block.feed_forward, MLP)]
    widths = [layer.w_down.shape[1] for layer in dense]
    if len(set(widths)) < 2:
        return settings, 0
    widest = max(widths)
    for layer, width in zip(dense, widths, strict=True):
        if width < widest:
            _widen(layer, width, widest)
    return dataclasses.replace(settings, ffn_width=widest), sum(widest - width for width in widths)


@torch.no_grad()
def _widen(layer: MLP, width: int, wider: int) -> None:
    """Give a layer further hidden units whose weights are all zero; gate and up rows each get theirs."""
    parts = layer.w_in.shape[0] // width
    layer.w_in = nn.Parameter(_padded(layer.w_in.unflatten(0, (parts, width)), 1, wider).flatten(0, 1))
    layer.w_down = nn.Parameter(_padded(layer.w_down, 1, wider))
    if layer.b_in is not None:
        layer.b_in = nn.Parameter(_padded(layer.b_in.unflatten(0, (parts, width)), 1, wider).flatten())


def _padded(value: Tensor, axis: int, size: int) -> Tensor:
    """Return a tensor with zeros behind it along one axis."""
    shape = list(value.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], dim=axis)
