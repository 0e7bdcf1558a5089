"""A decoder block for a few new tokens behind a cache, in two native operators where it is a plain one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gatewright.backbones.attention import Attention, LayerCache
from gatewright.backbones.norm import RMSNorm
from gatewright.kernels import choose_backend, native
from gatewright.kernels.attention import SWITCH
from gatewright.kernels.native.attention import takes
from gatewright.kernels.native.decode import decode_attention, decode_experts
from gatewright.kernels.native.few import MOST_TOKENS
from gatewright.parts import Experts, Int8Experts, MoELayer, Router
from gatewright.parts.routing import top_k_of
from gatewright.parts.scores import native_name

if TYPE_CHECKING:
    from gatewright.backbones.transformer import Block


def few_tokens(x: Float[Tensor, "B S D"]) -> bool:
    """Return whether x is such a call: eager, without gradient or autocast, 1 to 8 tokens that the native
    operators take.
    """
    if torch.is_grad_enabled() or not native.runs_for(x) or torch.is_autocast_enabled("cpu"):
        return False
    if _has_any_global_hook():
        return False
    return 0 < x.shape[0] * x.shape[1] <= MOST_TOKENS and os.environ.get(SWITCH, "native") == "native"


def attend_few(
    block: Block,
    x: Float[Tensor, "B S D"],
    cos: Float[Tensor, "S head_dim"],
    sin: Float[Tensor, "S head_dim"],
    cache: LayerCache,
) -> Float[Tensor, "B S D"] | None:
    """Return what the block's attention adds to x, the cache extended; None where it is not a plain one."""
    attention, norm = block.attention, block.attention_norm
    if not _plain(attention, Attention) or not _plain(norm, RMSNorm):
        return None
    assert isinstance(attention, Attention)
    maps = attention.projections
    if not _turns_alone(attention) or cos.shape[-1] != attention.head_dim:
        return None
    if not all(_plain(one, nn.Linear) and one.bias is None for one in maps) or type(cache) is not LayerCache:
        return None
    weights = tuple(one.weight for one in maps)
    keys, end = cache.keys, cache.length + x.shape[1]
    same = all(one.dtype == x.dtype and one.is_contiguous() for one in weights)
    if not same or keys.dtype != x.dtype or end > keys.shape[2] or not takes(keys, keys):
        return None
    angles, stored = (cos, sin), (keys, cache.values)
    out = decode_attention(x, norm.weight, norm.eps, weights, angles, stored, cache.length)  # type: ignore[arg-type]
    cache.length = end
    return out


def add_experts(
    block: Block, x: Float[Tensor, "B S D"], added: Float[Tensor, "B S D"]
) -> Float[Tensor, "B S D"] | None:
    """Return x + added and what the block's sparse layer adds to that; None where it is not a plain one."""
    layer, norm = block.feed_forward, block.feed_forward_norm
    if not _plain(layer, MoELayer) or not _plain(norm, RMSNorm):
        return None
    assert isinstance(layer, MoELayer)
    router, experts = layer.router, layer.experts
    if not _plain(router, Router) or type(experts) not in (Experts, Int8Experts) or not _plain(experts):
        return None
    assert isinstance(experts, Experts | Int8Experts)
    capacity = layer.capacity
    top, scores = top_k_of(router.rule), native_name(router.scores)
    if layer.training or layer.shared is not None or router.bias is not None or top is None or scores is None:
        return None
    if capacity is not None and capacity.factor_in(False) is not None:
        return None
    fits = router.dtype == torch.float32 and top.num_selected <= min(64, layer.num_experts)
    if not fits or choose_backend(layer.backend)[0] != "native":
        return None
    held = experts.weights()
    if held.scale_in is None and held.w_in.dtype not in (x.dtype, torch.float32):
        return None
    return decode_experts(x, added, norm.weight, norm.eps, router.weight.contiguous(), scores, top, held)


def _turns_alone(attention: Attention) -> bool:
    """Return whether queries and keys are turned, and nothing else is done to them or to their scores."""
    more = (attention.window, attention.sinks, attention.temperature)
    turned = attention.rotary and not attention.interleaved and attention.qk_norm == "none"
    return turned and all(one is None for one in more)


def _plain(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Return whether a module is of exactly this class and nobody watches or replaced its forward."""
    if kind is not None and type(module) is not kind:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
