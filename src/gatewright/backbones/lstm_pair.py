"""The translation model of 2017: a recurrent encoder and a recurrent decoder that attends to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gatewright.backbones.encoder_decoder import Encoded, EncoderDecoder, PairBase
from gatewright.backbones.lstm import RecurrentBlock, State
from gatewright.backbones.lstm_attention import AttendedLSTM, Source, TwoWayLSTM
from gatewright.backbones.transformer import DecoderOutput
from gatewright.errors import UserError
from gatewright.kernels import apply_linears
from gatewright.parts import MoELayer, Router, Stats
from gatewright.parts.draws import fold
from gatewright.parts.dropout import check_dropout, dropped

# Apart from the layers, which fold their own number into the same key.
_EMBEDDING = 0x656D62


class RecurrentPairCache:
    """What a decoder remembers of `length` target tokens: the state of each LSTM, and the source."""

    def __init__(self, source: Source, bottom: State, layers: list[State | None]) -> None:
        self.source, self.bottom, self.layers, self.length = source, bottom, layers, 0

    def take(self, rows: Int64[Tensor, "R"]) -> None:
        """Keep these rows of the batch, in this order, each as often as it is named: what beams ask for."""
        states, keys, mask = self.source
        self.source = Source(states[rows], keys[rows], None if mask is None else mask[rows])
        self.bottom = (self.bottom[0][rows], self.bottom[1][rows])
        # torch's LSTM keeps its states as [1, B, D].
        self.layers = [None if own is None else (own[0][:, rows], own[1][:, rows]) for own in self.layers]


class RecurrentEncoderDecoder(PairBase):
    """A model of pairs with the call of `EncoderDecoder`: source [B, P], target [B, S] -> DecoderOutput.

    Equation: Shazeer et al. 2017, appendix E: the encoder is a pair of LSTMs, one from either end, then an
    LSTM for each of `encoder_feed_forwards`; the decoder is an LSTM that attends to the source, then one for
    each of `decoder_feed_forwards`. Such a module (a mixture, a dense layer or None) stands before its LSTM.
    Both texts have one vocabulary and one embedding. `context` and `target_context` are the lengths that it
    is trained on; `lstm_width` and `dropout` as in `LSTMDecoder`.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        encoder_feed_forwards: Sequence[nn.Module | None],
        decoder_feed_forwards: Sequence[nn.Module | None],
        *,
        lstm_width: int = 0,
        dropout: float = 0.0,
        context: int = 128,
        target_context: int = 128,
    ) -> None:
        super().__init__()
        if min(vocab_size, width, context, target_context) < 1:
            raise UserError(
                f"vocab_size {vocab_size}, width {width}, context {context}, target_context "
                f"{target_context}; allowed: 1 or more of each"
            )
        if lstm_width and lstm_width <= width:
            raise UserError(
                f"lstm_width {lstm_width} with width {width}; allowed: more than the width, or 0 for as many "
                "cells and no projection"
            )
        self.vocab_size, self.width, self.dropout = vocab_size, width, check_dropout(dropout)
        self.context, self.target_context = context, target_context
        sizes = (lstm_width, dropout)
        self.embedding = nn.Embedding(vocab_size, width)
        self.source_bottom, self.target_bottom = TwoWayLSTM(width, *sizes), AttendedLSTM(width, *sizes)
        self.encoder = nn.ModuleList(RecurrentBlock(width, own, *sizes) for own in encoder_feed_forwards)
        self.decoder = nn.ModuleList(RecurrentBlock(width, own, *sizes) for own in decoder_feed_forwards)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def blocks(self) -> dict[str, RecurrentBlock]:
        """Return the layers above the bottom ones by name: "encoder.layers.0", "decoder.layers.0"."""
        return {
            f"{name}.layers.{i}": block
            for name, stack in (("encoder", self.encoder), ("decoder", self.decoder))
            for i, block in enumerate(stack)
            if isinstance(block, RecurrentBlock)
        }

    def routers(self) -> dict[str, Router]:
        """Return every router under the name that its record has in Stats."""
        return {
            f"{name}.{router}": found
            for name, block in self.blocks().items()
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
        x = self.source_bottom(self._embedded(source, key), mask, key)
        x, _, stats = self._through(x, "encoder", None, source, mask, key, **more)
        return Encoded(x, mask, stats)

    def new_cache(self, encoded: Encoded, capacity: int) -> RecurrentPairCache:
        """Return a cache that holds the source; `capacity` is for `EncoderDecoder`, whose caches grow."""
        source = self.target_bottom.attention.source(encoded.states, encoded.mask)
        empty: list[State | None] = [None] * len(self.decoder)
        return RecurrentPairCache(source, self.target_bottom.empty(encoded.states), empty)

    def decode(
        self,
        target: Int64[Tensor, "B S"],
        source: Encoded | RecurrentPairCache,
        mask: Bool[Tensor, "B S"] | None = None,
        *,
        key: Int64[Tensor, ""] | None = None,
        only_last: bool = False,
        **more: Any,
    ) -> DecoderOutput:
        """Return logits and the decoder's Stats for a target, given the source as `encode` returned it; with
        a cache in its place, `target` continues what the cache holds.
        """
        cache = source if isinstance(source, RecurrentPairCache) else self.new_cache(source, 0)
        x = self._embedded(target, key)
        x, bottom = self.target_bottom(x, cache.source, cache.bottom, key)
        x, layers, stats = self._through(x, "decoder", cache.layers, target, mask, key, **more)
        if cache is source:
            cache.bottom, cache.layers, cache.length = bottom, layers, cache.length + target.shape[1]
        (logits,) = apply_linears(x[:, -1:] if only_last else x, (self.head,))
        return DecoderOutput(logits, stats)

    def _embedded(self, tokens: Tensor, key: Tensor | None) -> Float[Tensor, "B S D"]:
        x = self.embedding(tokens)
        if not (self.training and self.dropout):
            return x
        return dropped(x, self.dropout, None if key is None else fold(key, _EMBEDDING))

    def _through(
        self,
        x: Tensor,
        stack: str,
        states: list[State | None] | None,
        tokens: Tensor,
        mask: Tensor | None,
        key: Tensor | None,
        capture: bool = False,
        with_stats: bool = True,
    ) -> tuple[Tensor, list[State | None], Stats]:
        """Return the output of a stack's layers above the bottom one, their states and Stats."""
        stats, after = Stats(), []
        own_blocks = {name: block for name, block in self.blocks().items() if name.startswith(stack)}
        for i, (name, block) in enumerate(own_blocks.items()):
            own_key = None if key is None else fold(key, i + 1)
            state = None if states is None else states[i]
            x, last, own = block(x, state, capture, own_key, tokens, with_stats, mask)
            after.append(last)
            stats = stats | own.under(name)
        return x, after, stats


# What trains on pairs and writes targets by beams.
PairModel = EncoderDecoder | RecurrentEncoderDecoder
