"""The decoder: pre-norm blocks of attention and a feed-forward layer that is dense or a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewright.backbones.attention import Attention, LayerCache, RotaryPositions
from gatewright.backbones.decoding import add_experts, attend_few, few_tokens
from gatewright.backbones.future import FutureToken
from gatewright.backbones.latent import LatentAttention
from gatewright.backbones.norm import RMSNorm
from gatewright.backbones.scaling import RopeScaling
from gatewright.errors import UserError
from gatewright.kernels import apply_linears
from gatewright.parts import MoELayer, Router, Stats
from gatewright.parts.draws import fold
from gatewright.parts.dropout import check_dropout, dropped

AnyAttention: TypeAlias = Attention | LatentAttention
# Apart from the layers, which fold their own number into the same key.
_ENDS = 0x656E6473


class DecoderOutput(NamedTuple):
    """What a decoder returns: `logits` [B, S, V] and the Stats of its routers, by name
    ("layers.3.router"). `future`: in training, where the model predicts further tokens, the logits of depth
    k = 1, 2, ..., [B, S - k, V]: at i, those of token i + k + 1.
    """

    logits: Float[Tensor, "B S V"]
    stats: Stats
    future: tuple[Tensor, ...] = ()


class KVCache:
    """One LayerCache per layer, and the position that the next token takes."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self.layers[0].length if self.layers else 0

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on; what is appended takes their place."""
        for layer in self.layers:
            layer.length = min(length, layer.length)

    def take_over(self, other: KVCache) -> None:
        """Hold what another cache of the same model holds, which is of another capacity."""
        for layer, old in zip(self.layers, other.layers, strict=True):
            layer.keys[:, :, : old.length] = old.keys[:, :, : old.length]
            layer.values[:, :, : old.length] = old.values[:, :, : old.length]
            layer.length = old.length


def lessened(
    module: Block | Decoder, x: Float[Tensor, "B S D"], key: Int64[Tensor, ""] | None, place: int
) -> Float[Tensor, "B S D"]:
    """Return x with the module's dropout, in training; `place` tells apart the draws of one key."""
    if not (module.training and module.dropout):
        return x
    return dropped(x, module.dropout, None if key is None else fold(key, place))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): [B, S, D] -> ([B, S, D], Stats). In training
    `dropout` falls on what either adds.
    """

    def __init__(
        self,
        width: int,
        attention: AnyAttention,
        feed_forward: nn.Module,
        norm_eps: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = RMSNorm(width, norm_eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(width, norm_eps)
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        cos: Float[Tensor, "S rotary"],
        sin: Float[Tensor, "S rotary"],
        cache: LayerCache | None = None,
        capture: bool = False,
        key: Int64[Tensor, ""] | None = None,
        token_ids: Int64[Tensor, "B S"] | None = None,
        with_stats: bool = True,
    ) -> tuple[Float[Tensor, "B S D"], Stats]:
        """Return the block's output and the Stats of its router (empty for a dense block); `key`,
        `token_ids` and `with_stats` are what MoELayer takes.
        """
        few = cache is not None and not with_stats and few_tokens(x)
        attended = attend_few(self, x, cos, sin, cache) if few and cache is not None else None
        if attended is None:
            attended = self.attention(self.attention_norm(x), cos, sin, cache)
        if few and (done := add_experts(self, x, attended)) is not None:
            return done, Stats()
        x, normed = self.feed_forward_norm.after_adding(x, lessened(self, attended, key, 0))
        if isinstance(self.feed_forward, MoELayer):
            more = {"key": key, "token_ids": token_ids, "with_stats": with_stats}
            y, stats = self.feed_forward(normed, capture=capture, **more)
            return x + lessened(self, y, key, 1), stats
        keyed = {"key": key} if key is not None and getattr(self.feed_forward, "takes_key", False) else {}
        return x + lessened(self, self.feed_forward(normed, **keyed), key, 1), Stats()


class Decoder(nn.Module):
    """A causal language model: tokens [B, S] int64 -> DecoderOutput(logits [B, S, V], stats).

    Args: `feed_forwards` holds one module per layer, a MoELayer or a plain [..., D] -> [..., D] module: the
    pattern of dense and sparse layers is this list. `context` is the longest text it is trained on; positions
    beyond it are refused. `dropout`: in training, of the embedding, of what each half of a block adds, and of
    what the head reads. `attentions`, one per layer, replace those built here from heads and
    `qk_norm`; they say how many of a head's numbers `rotary_dim` are turned. `future` are blocks that
    predict, each, one token further (`FutureToken`); only training and `ahead` ask them. With `recompute`
    set, the backward pass computes each block again from its input instead of keeping what is inside it;
    numbers are the same.
    """

    recompute: bool = False

    def __init__(
        self,
        vocab_size: int,
        width: int,
        num_heads: int,
        feed_forwards: Sequence[nn.Module],
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context: int = 1024,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        qk_norm: str = "none",
        tie_embeddings: bool = False,
        attentions: Sequence[AnyAttention] | None = None,
        rotary_dim: int | None = None,
        rope_scaling: RopeScaling | str = "none",
        future: Sequence[Block] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(vocab_size, width, context) < 1 or not feed_forwards:
            raise UserError(
                f"vocab_size {vocab_size}, width {width}, context {context}, {len(feed_forwards)} layers; "
                "allowed: 1 or more of each"
            )
        if head_dim is None and (num_heads < 1 or width % num_heads):
            raise UserError(
                f"width {width} with num_heads {num_heads}; allowed: heads that divide the width; or give "
                "head_dim"
            )
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.vocab_size, self.width, self.context = vocab_size, width, context
        self.dropout = check_dropout(dropout)
        self.embedding = nn.Embedding(vocab_size, width)
        self.rotary = RotaryPositions(rotary_dim or self.head_dim, rope_theta, rope_scaling)
        heads = (width, num_heads, self.num_kv_heads, self.head_dim)
        if attentions is None:
            attentions = [Attention(*heads, qk_norm=qk_norm, norm_eps=norm_eps) for _ in feed_forwards]
        if len(attentions) != len(feed_forwards):
            raise UserError(
                f"{len(attentions)} attentions for {len(feed_forwards)} layers; allowed: one for each"
            )
        self.layers = nn.ModuleList(
            Block(width, attention, feed_forward, norm_eps, dropout)
            for attention, feed_forward in zip(attentions, feed_forwards, strict=True)
        )
        self.norm = RMSNorm(width, norm_eps)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.tie_embeddings = tie_embeddings
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.future = nn.ModuleList(FutureToken(width, block, norm_eps) for block in future)

    @property
    def future_blocks(self) -> list[Block]:
        """The blocks that predict further tokens, by depth."""
        blocks = (module.block for module in self.future if isinstance(module, FutureToken))
        return [block for block in blocks if isinstance(block, Block)]

    def new_cache(self, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """Return an empty cache for `batch` texts of up to `capacity` positions (default: the context)."""
        weight = self.embedding.weight
        size, kind = capacity or self.context, dtype or weight.dtype
        blocks = (block for block in self.layers if isinstance(block, Block))
        return KVCache([block.attention.new_cache(batch, size, weight, kind) for block in blocks])

    def routers(self) -> dict[str, Router]:
        """Return every router under the name that its record has in Stats."""
        blocks = [(f"layers.{i}", block) for i, block in enumerate(self.layers)]
        blocks += [(f"future.{i}", block) for i, block in enumerate(self.future_blocks)]
        return {
            f"{place}.{name}": router
            for place, block in blocks
            if isinstance(block.feed_forward, MoELayer)
            for name, router in block.feed_forward.routers().items()
        }

    def forward(
        self,
        tokens: Int64[Tensor, "B S"],
        cache: KVCache | None = None,
        capture: bool = False,
        key: Int64[Tensor, ""] | None = None,
        *,
        with_stats: bool = True,
        only_last: bool = False,
    ) -> DecoderOutput:
        """Return logits and Stats. With a cache, `tokens` continue it; with `capture`, Stats hold every
        token's way; `key` 0-d int64 fixes the routers' noise and coins in training (None: torch's generator).

        For generation: without `with_stats` the Stats are empty, and with `only_last` the logits are those
        after the last token, [B, 1, V].
        """
        x, stats = self.read(tokens, cache, capture, key, with_stats=with_stats)
        states = self.norm(x[:, -1:] if only_last else x)
        (logits,) = apply_linears(lessened(self, states, key, _ENDS + 1), (self.head,))
        if not len(self.future) or not self.training or cache is not None or only_last:
            return DecoderOutput(logits, stats)
        further = []
        for depth in range(1, min(len(self.future), tokens.shape[1] - 1) + 1):
            states, own = self.ahead(states[:, : tokens.shape[1] - depth], tokens[:, depth:], depth, key=key)
            stats = stats | own.under(f"future.{depth - 1}")
            further += apply_linears(states, (self.head,))
        return DecoderOutput(logits, stats, tuple(further))

    def read(
        self,
        tokens: Int64[Tensor, "B S"],
        cache: KVCache | None = None,
        capture: bool = False,
        key: Int64[Tensor, ""] | None = None,
        *,
        with_stats: bool = True,
    ) -> tuple[Float[Tensor, "B S D"], Stats]:
        """Return what leaves the last block, before the last norm, and Stats; arguments as `forward`'s."""
        start = cache.length if cache is not None else 0
        length = tokens.shape[1]
        if start + length > self.context:
            raise UserError(
                f"{start + length} positions in a model of context {self.context}; allowed: up to "
                f"{self.context}; "
                "shorten the text or build the model with a longer context"
            )
        x = lessened(self, self.embedding(tokens), key, _ENDS)
        cos, sin = self.rotary.tables(start, length, tokens.device, x.dtype)
        stats = Stats()
        for i, block in enumerate(self.layers):
            own_key = None if key is None else fold(key, i)
            own_cache = None if cache is None else cache.layers[i]
            given = (x, cos, sin, own_cache, capture, own_key, tokens, with_stats)
            if self.recompute and cache is None and torch.is_grad_enabled():
                x, own = checkpoint(block, *given, use_reentrant=False)
            else:
                x, own = block(*given)
            stats = stats | own.under(f"layers.{i}")
        return x, stats

    def ahead(
        self,
        states: Float[Tensor, "B S D"],
        tokens: Int64[Tensor, "B S"],
        depth: int = 1,
        cache: LayerCache | None = None,
        key: Int64[Tensor, ""] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], Stats]:
        """Return the states of `depth` from those of the depth before (0: after the last norm) and the tokens
        that stand `depth` places behind them; with a cache, both continue it.
        """
        start = depth + (0 if cache is None else cache.length)
        embedded = self.embedding(tokens)
        cos, sin = self.rotary.tables(start, tokens.shape[1], tokens.device, embedded.dtype)
        own_key = None if key is None else fold(key, len(self.layers) + depth - 1)
        found: tuple[Tensor, Stats] = self.future[depth - 1](
            states, embedded, cos, sin, cache, own_key, tokens, with_stats=cache is None
        )
        return found
