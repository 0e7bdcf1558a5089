"""A stack of blocks whose attention shares one relative bias: an encoder, or a decoder that looks across."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewright.backbones.attention import LayerCache
from gatewright.backbones.norm import RMSNorm
from gatewright.backbones.relative_attention import BiasedAttention, RelativeBias
from gatewright.parts import MoELayer, Stats
from gatewright.parts.draws import fold
from gatewright.parts.dropout import dropped


class StackBlock(nn.Module):
    """x + attention(norm(x)), in a decoder + cross(norm(x), source), + feed_forward(norm(x)): [B, S, D] ->
    ([B, S, D], Stats). `dropout` falls on what each part adds.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        feed_forward: nn.Module,
        *,
        crossed: bool,
        scale: float,
        norm_eps: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = RMSNorm(width, norm_eps)
        self.attention = BiasedAttention(width, num_heads, head_dim, scale=scale)
        self.cross_norm = RMSNorm(width, norm_eps) if crossed else None
        self.cross = BiasedAttention(width, num_heads, head_dim, scale=scale) if crossed else None
        self.feed_forward_norm = RMSNorm(width, norm_eps)
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        bias: Float[Tensor, "#B #H #S P"],
        cross: tuple[Tensor, Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        mask: Bool[Tensor, "B S"] | None = None,
        capture: bool = False,
        key: Int64[Tensor, ""] | None = None,
        token_ids: Int64[Tensor, "B S"] | None = None,
        with_stats: bool = True,
    ) -> tuple[Float[Tensor, "B S D"], Stats]:
        """Return the block's output and the Stats of its router.

        Args: `cross` holds the source's keys, values and bias; `cache` is extended by x's own; `mask`,
        `capture`, `key`, `token_ids` and `with_stats` are what MoELayer takes.
        """
        normed = self.attention_norm(x)
        keys, values = self.attention.keys_and_values(normed)
        if cache is not None:
            keys, values = cache.append(keys, values)
        x = x + self._dropped(self.attention(normed, keys, values, bias), key, 0)
        if self.cross is not None and self.cross_norm is not None:
            assert cross is not None
            x = x + self._dropped(self.cross(self.cross_norm(x), *cross), key, 1)
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoELayer):
            more = {"key": key, "token_ids": token_ids, "with_stats": with_stats}
            y, stats = self.feed_forward(normed, mask, capture, **more)
            return x + self._dropped(y, key, 2), stats
        return x + self._dropped(self.feed_forward(normed), key, 2), Stats()

    def _dropped(self, y: Tensor, key: Tensor | None, place: int) -> Tensor:
        if not (self.training and self.dropout):
            return y
        return dropped(y, self.dropout, None if key is None else fold(key, place))


class Stack(nn.Module):
    """Blocks that share one relative bias, and the norm behind them: an encoder, or with `crossed` a
    decoder. `dropout` falls on the input too.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        feed_forwards: Sequence[nn.Module],
        *,
        crossed: bool,
        num_buckets: int,
        max_distance: int,
        scale: float,
        norm_eps: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.bias = RelativeBias(num_heads, num_buckets, max_distance, both_ways=not crossed)
        self.layers = nn.ModuleList(
            StackBlock(
                width,
                num_heads,
                head_dim,
                one,
                crossed=crossed,
                scale=scale,
                norm_eps=norm_eps,
                dropout=dropout,
            )
            for one in feed_forwards
        )
        self.norm = RMSNorm(width, norm_eps)

    def blocks(self) -> Iterator[StackBlock]:
        """Yield the layers, as what they are."""
        yield from (layer for layer in self.layers if isinstance(layer, StackBlock))

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        bias: Float[Tensor, "#B #H #S P"],
        crosses: Sequence[tuple[Tensor, Tensor, Tensor]] = (),
        caches: Sequence[LayerCache] = (),
        key: Int64[Tensor, ""] | None = None,
        recompute: bool = False,
        **more: Any,
    ) -> tuple[Float[Tensor, "B S D"], Stats]:
        """Return the stack's output and the Stats of its routers, by layer; `more` goes to every block."""
        stats = Stats()
        if self.training and self.dropout:
            x = dropped(x, self.dropout, None if key is None else fold(key, len(self.layers)))
        for i, block in enumerate(self.layers):
            cross, cache = crosses[i] if crosses else None, caches[i] if caches else None
            own_key = None if key is None else fold(key, i)
            if recompute and torch.is_grad_enabled():
                x, own = checkpoint(block, x, bias, cross, key=own_key, use_reentrant=False, **more)
            else:
                x, own = block(x, bias, cross, cache, key=own_key, **more)
            stats = stats | own.under(f"layers.{i}")
        return self.norm(x), stats
