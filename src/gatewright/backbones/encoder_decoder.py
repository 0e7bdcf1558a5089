"""The encoder-decoder: a stack that reads a source both ways, and one that writes a target from it (T5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gatewright.backbones.attention import LayerCache
from gatewright.backbones.relative_attention import padding_bias
from gatewright.backbones.stack import Stack
from gatewright.backbones.transformer import DecoderOutput
from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import apply_linears
from gatewright.parts import MoELayer, Router, Stats
from gatewright.parts.draws import fold

TIES = ("all", "inputs", "none")
# Apart from the encoder's layers, which fold their own number into the same key.
_DECODER = 0x646563


class Encoded(NamedTuple):
    """What an encoder hands over: `states` [B, P, D], the source's `mask` [B, P] or none, and Stats."""

    states: Float[Tensor, "B P D"]
    mask: Bool[Tensor, "B P"] | None
    stats: Stats


class PairCache:
    """What a decoder has worked out for a batch of targets: per layer, keys and values of the target so far,
    and those of the source.
    """

    def __init__(
        self, layers: list[LayerCache], source: list[tuple[Tensor, Tensor]], mask: Tensor | None
    ) -> None:
        self.layers, self.source, self.mask = layers, source, mask

    @property
    def length(self) -> int:
        """Target positions stored so far."""
        return self.layers[0].length

    def take(self, rows: Int64[Tensor, "R"]) -> None:
        """Keep these rows of the batch, in this order, each as often as it is named: what beams ask for."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.source = [(keys[rows], values[rows]) for keys, values in self.source]
        self.mask = None if self.mask is None else self.mask[rows]


class PairBase(nn.Module):
    """What every model of pairs is called by: the source is encoded, then the target decoded. A backbone
    gives `encode` and `decode`.
    """

    encode: Callable[..., Any]
    decode: Callable[..., DecoderOutput]

    def forward(
        self,
        source: Int64[Tensor, "B P"],
        target: Int64[Tensor, "B S"],
        source_mask: Bool[Tensor, "B P"] | None = None,
        target_mask: Bool[Tensor, "B S"] | None = None,
        capture: bool = False,
        key: Int64[Tensor, ""] | None = None,
        *,
        with_stats: bool = True,
    ) -> DecoderOutput:
        """Return logits [B, S, V] and the Stats of all routers; `key` 0-d int64 fixes noise and dropout."""
        more: Any = {"capture": capture, "with_stats": with_stats}
        encoded = self.encode(source, source_mask, key=key, **more)
        own_key = None if key is None else fold(key, _DECODER)
        output = self.decode(target, encoded, target_mask, key=own_key, **more)
        return DecoderOutput(output.logits, encoded.stats | output.stats)


class EncoderDecoder(PairBase):
    """A model of pairs: source [B, P] and target [B, S] int64 -> DecoderOutput(logits [B, S, V], stats).

    The target that goes in begins with a start id, and logits[:, s] is about the id that follows target[:,
    s]. Padding stands on the right of both; `source_mask` and `target_mask` (False = padding) keep it out of
    attention, capacity and statistics. Routers are named "encoder.layers.3.router" and "decoder. ...".
    Args: one feed-forward module per layer of either stack, MoELayer or plain; `source_vocab_size` for a
    source with a vocabulary of its own; `tie` "all" (one matrix embeds both texts and gives the logits, which
    are then divided by sqrt(width): T5), "inputs" (one embedding, and a head: T5 1.1) or "none"; `context`
    and `target_context` are the lengths it is trained on (no position is refused: buckets end nowhere);
    `attention_scale` 1 is T5's; `dropout` falls on the embedded texts and on what every part of a layer adds,
    in training. `recompute` as in `Decoder`.
    """

    recompute: bool = False

    def __init__(
        self,
        vocab_size: int,
        width: int,
        num_heads: int,
        encoder_feed_forwards: Sequence[nn.Module],
        decoder_feed_forwards: Sequence[nn.Module],
        *,
        head_dim: int,
        context: int = 512,
        target_context: int = 114,
        source_vocab_size: int | None = None,
        tie: str = "all",
        num_buckets: int = 32,
        max_distance: int = 128,
        attention_scale: float = 1.0,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if tie not in TIES:
            raise UserError(f"tie {tie!r} is unknown{did_you_mean(tie, TIES)}; allowed: {', '.join(TIES)}")
        sizes = (vocab_size, source_vocab_size or vocab_size, width, context, target_context)
        if min(sizes) < 1 or not encoder_feed_forwards or not decoder_feed_forwards:
            raise UserError(
                f"vocab_size {vocab_size}, width {width}, context {context}, target_context "
                f"{target_context}, {len(encoder_feed_forwards)} and {len(decoder_feed_forwards)} layers; "
                "allowed: 1 or more of each"
            )
        if tie != "none" and source_vocab_size not in (None, vocab_size):
            raise UserError(
                f"source_vocab_size {source_vocab_size} with tie {tie!r}; allowed: the target's "
                f"{vocab_size}, or tie none"
            )
        if not 0 <= dropout < 1:
            raise UserError(f"dropout {dropout}; allowed: 0 or more and below 1; 0 is none")
        self.vocab_size, self.source_vocab_size = vocab_size, source_vocab_size or vocab_size
        self.width, self.num_heads, self.head_dim = width, num_heads, head_dim
        self.context, self.target_context, self.tie = context, target_context, tie
        common: Any = {"num_buckets": num_buckets, "max_distance": max_distance, "norm_eps": norm_eps}
        common |= {"scale": attention_scale, "dropout": dropout}
        self.source_embedding = nn.Embedding(self.source_vocab_size, width)
        self.encoder = Stack(width, num_heads, head_dim, encoder_feed_forwards, crossed=False, **common)
        self.target_embedding = nn.Embedding(vocab_size, width)
        self.decoder = Stack(width, num_heads, head_dim, decoder_feed_forwards, crossed=True, **common)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tie != "none":
            self.target_embedding.weight = self.source_embedding.weight
        if tie == "all":
            self.head.weight = self.source_embedding.weight

    def routers(self) -> dict[str, Router]:
        """Return every router under the name that its record has in Stats."""
        return {
            f"{name}.layers.{i}.{router}": found
            for name, stack in (("encoder", self.encoder), ("decoder", self.decoder))
            for i, block in enumerate(stack.blocks())
            if isinstance(block.feed_forward, MoELayer)
            for router, found in block.feed_forward.routers().items()
        }

    def encode(
        self,
        source: Int64[Tensor, "B P"],
        mask: Bool[Tensor, "B P"] | None = None,
        *,
        key: Int64[Tensor, ""] | None = None,
        **more: Any,
    ) -> Encoded:
        """Return the source as the decoder reads it; `more` is `capture` and `with_stats`."""
        x = self.source_embedding(source)
        bias = self.encoder.bias(source.shape[1]) + padding_bias(mask, source.shape[0], source.shape[1], x)
        more |= {"mask": mask, "token_ids": source, "recompute": self.recompute}
        states, stats = self.encoder(x, bias, key=key, **more)
        return Encoded(states, mask, stats.under("encoder"))

    def new_cache(self, encoded: Encoded, capacity: int) -> PairCache:
        """Return a cache for targets of up to `capacity` positions, which holds the source's keys already."""
        batch = encoded.states.shape[0]
        shape = (batch, self.num_heads, capacity, self.head_dim)
        layers = [
            LayerCache(encoded.states.new_zeros(shape), encoded.states.new_zeros(shape))
            for _ in self.decoder.blocks()
        ]
        return PairCache(layers, self._source_keys(encoded), encoded.mask)

    def _source_keys(self, encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
        crosses = (block.cross for block in self.decoder.blocks())
        return [cross.keys_and_values(encoded.states) for cross in crosses if cross is not None]

    def decode(
        self,
        target: Int64[Tensor, "B S"],
        source: Encoded | PairCache,
        mask: Bool[Tensor, "B S"] | None = None,
        *,
        key: Int64[Tensor, ""] | None = None,
        only_last: bool = False,
        **more: Any,
    ) -> DecoderOutput:
        """Return logits and the decoder's Stats for a target, given the source as `encode` returned it; with
        a cache in its place, `target` continues what the cache holds.
        """
        x = self.target_embedding(target)
        cached = isinstance(source, PairCache)
        pairs = source.source if isinstance(source, PairCache) else self._source_keys(source)
        seen = padding_bias(source.mask, x.shape[0], pairs[0][0].shape[2], x)
        past = source.length if isinstance(source, PairCache) else 0
        bias = self.decoder.bias(target.shape[1], past)
        more |= {"mask": mask, "token_ids": target, "recompute": self.recompute and not cached}
        caches = source.layers if isinstance(source, PairCache) else ()
        crosses = [(keys, values, seen) for keys, values in pairs]
        x, stats = self.decoder(x, bias, crosses, caches, key, **more)
        x = x[:, -1:] if only_last else x
        (logits,) = apply_linears(x * self.width**-0.5 if self.tie == "all" else x, (self.head,))
        return DecoderOutput(logits, stats.under("decoder"))
