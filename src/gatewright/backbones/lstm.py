"""The language model of 2017: LSTM layers, and between them feed-forward layers, dense or mixtures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewright.backbones.transformer import Decoder, DecoderOutput
from gatewright.errors import UserError
from gatewright.kernels import apply_linears
from gatewright.parts import MoELayer, Router, Stats
from gatewright.parts.draws import fold
from gatewright.parts.dropout import check_dropout, dropped

State = tuple[Tensor, Tensor]


@dataclass
class LSTMCache:
    """What an LSTMDecoder remembers of `length` tokens: output and cell of each layer, of one size however
    long the text is.
    """

    states: list[State | None]
    length: int = 0


class RecurrentBlock(nn.Module):
    """x + drop(sigmoid(feed_forward(x))) where there is a feed-forward layer, then x + drop(LSTM(x)):
    [B, S, D] -> ([B, S, D], state, Stats).

    Equation: Shazeer et al. 2017 appendix C.1: dropout to each layer's output, then its input is added; the
    mixture's output passes a sigmoid. The mixture sees all B S tokens at once (section 3.1).
    Args: `lstm_width` cells whose output is projected to D (Sak et al. 2014); 0 is D cells and no projection.
    The LSTM computes in the dtype of its weights, also under autocast.
    """

    def __init__(
        self, width: int, feed_forward: nn.Module | None, lstm_width: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout, self.feed_forward = dropout, feed_forward
        projected = width if lstm_width else 0
        self.lstm = nn.LSTM(width, lstm_width or width, proj_size=projected, batch_first=True)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        state: State | None = None,
        capture: bool = False,
        key: Int64[Tensor, ""] | None = None,
        token_ids: Int64[Tensor, "B S"] | None = None,
        with_stats: bool = True,
        mask: Bool[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], State, Stats]:
        """Return the output, the LSTM's state after the last token, and the Stats of the router; `mask`
        False = padding on the right, which the router does not see.
        """
        stats = Stats()
        if self.feed_forward is not None:
            if isinstance(self.feed_forward, MoELayer):
                more = {"key": key, "token_ids": token_ids, "with_stats": with_stats}
                y, stats = self.feed_forward(x, mask, capture=capture, **more)
            else:
                y = self.feed_forward(x)
            x = x + self._dropped(torch.sigmoid(y), key, 0)
        with torch.autocast(x.device.type, enabled=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
            y, after = self.lstm(x.to(next(self.lstm.parameters()).dtype), state)
        return x + self._dropped(y, key, 1), after, stats

    def _dropped(self, y: Tensor, key: Tensor | None, place: int) -> Tensor:
        if not (self.training and self.dropout):
            return y
        return dropped(y, self.dropout, None if key is None else fold(key, place))


class LSTMDecoder(nn.Module):
    """A recurrent language model in the form of `Decoder`: tokens [B, S] int64 -> DecoderOutput.

    Args: `feed_forwards` holds one module per LSTM, which stands before it, or None: (None, MoELayer) is
    embedding, LSTM, mixture, LSTM. `dropout` also falls on the embedding. `context` is the longest text it is
    trained on; longer ones are refused, as by `Decoder`. Texts begin with an empty state.
    """

    recompute: bool = False

    def __init__(
        self,
        vocab_size: int,
        width: int,
        feed_forwards: Sequence[nn.Module | None],
        lstm_width: int = 0,
        dropout: float = 0.0,
        context: int = 1024,
    ) -> None:
        super().__init__()
        if min(vocab_size, width, context) < 1 or not feed_forwards:
            raise UserError(
                f"vocab_size {vocab_size}, width {width}, context {context}, {len(feed_forwards)} layers; "
                "allowed: 1 or more of each"
            )
        if lstm_width and lstm_width <= width:
            raise UserError(
                f"lstm_width {lstm_width} with width {width}; allowed: more than the width, to which the "
                "cells are projected, or 0 for as many and no projection"
            )
        self.vocab_size, self.width, self.context = vocab_size, width, context
        self.dropout = check_dropout(dropout)
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(RecurrentBlock(width, own, lstm_width, dropout) for own in feed_forwards)
        self.head = nn.Linear(width, vocab_size, bias=False)

    @property
    def future_blocks(self) -> list[nn.Module]:
        """Blocks that predict further tokens: there are none."""
        return []

    def new_cache(
        self, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None
    ) -> LSTMCache:
        """Return an empty cache; its size depends on none of the arguments, which `Decoder` takes too."""
        return LSTMCache([None] * len(self.layers))

    def routers(self) -> dict[str, Router]:
        """Return every router under the name that its record has in Stats."""
        layers = ((i, block.feed_forward) for i, block in enumerate(self.layers))
        return {
            f"layers.{i}.{name}": router
            for i, layer in layers
            if isinstance(layer, MoELayer)
            for name, router in layer.routers().items()
        }

    def forward(
        self,
        tokens: Int64[Tensor, "B S"],
        cache: LSTMCache | None = None,
        capture: bool = False,
        key: Int64[Tensor, ""] | None = None,
        *,
        with_stats: bool = True,
        only_last: bool = False,
    ) -> DecoderOutput:
        """Return logits and Stats; the arguments mean what they mean to `Decoder`, and `key` fixes dropout
        too.
        """
        length = tokens.shape[1] + (0 if cache is None else cache.length)
        if length > self.context:
            raise UserError(
                f"{length} positions in a model of context {self.context}; allowed: up to {self.context}; "
                "shorten the text or build the model with a longer context"
            )
        x = self.embedding(tokens)
        if self.training and self.dropout:
            x = dropped(x, self.dropout, None if key is None else fold(key, len(self.layers)))
        stats = Stats()
        for i, block in enumerate(self.layers):
            own_key = None if key is None else fold(key, i)
            state = None if cache is None else cache.states[i]
            given = (x, state, capture, own_key, tokens, with_stats)
            if self.recompute and cache is None and torch.is_grad_enabled():
                x, after, own = checkpoint(block, *given, use_reentrant=False)
            else:
                x, after, own = block(*given)
            if cache is not None:
                cache.states[i] = after
            stats = stats | own.under(f"layers.{i}")
        if cache is not None:
            cache.length = length
        (logits,) = apply_linears(x[:, -1:] if only_last else x, (self.head,))
        return DecoderOutput(logits, stats)


# What trains on text and generates it.
LanguageModel = Decoder | LSTMDecoder
