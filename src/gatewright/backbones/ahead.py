"""Reading a text with a guess of its next token: two tokens per pass where the guess was right."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.backbones.transformer import Decoder
from gatewright.errors import UserError
from gatewright.kernels import apply_linears


class AheadReader:
    """Reads a growing text [1, S] and gives the logits after its last token; the model's first further block
    guesses the token behind it (DeepSeek-V3 section 5.4.3: self-speculative decoding).

    A guess is read in the pass of the token before it. If the text goes on as guessed, its logits are there
    already; if not, they are forgotten. What is returned is therefore the model's own, however ids are drawn.
    `passes` counts the main model's; the caller sees to evaluation mode and to no gradients.
    Raises: UserError for a model that predicts no further token.
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        if not isinstance(model, Decoder) or not len(model.future):
            raise UserError(
                "this model predicts no token behind the next; allowed: one with future_tokens 1 or more; "
                "decode without"
            )
        self.model, self.capacity, self.passes = model, capacity, 0
        self.cache = model.new_cache(1, capacity)
        like = model.embedding.weight
        self.own_cache = model.future_blocks[0].attention.new_cache(1, capacity, like, like.dtype)
        # States that the further block has not read, of the last positions of the cache.
        self.states: Tensor | None = None
        self.guess: tuple[int, Tensor] | None = None

    def read(self, text: Int64[Tensor, "B S"]) -> Float[Tensor, "B V"]:
        """Return logits [1, V] after the last id of `text`, which continues what was read before."""
        if self.guess is not None:
            guessed, logits = self.guess
            self.guess = None
            if text.shape[1] == self.cache.length and int(text[0, -1]) == guessed:
                return logits
            self.cache.cut(self.cache.length - 1)
            assert self.states is not None
            self.states = self.states[:, :-1]
        new, guess = text[:, self.cache.length :], self._guess(text)
        given = new if guess is None else torch.cat([new, guess], dim=1)
        x, _ = self.model.read(given, self.cache, with_stats=False)
        self.passes += 1
        states = self.model.norm(x)
        kept = states if guess is not None or self.states is None else torch.cat([self.states, states], 1)
        self.states = kept
        (found,) = apply_linears(states[:, -1 if guess is None else -2 :], (self.model.head,))
        if guess is not None:
            self.guess = int(guess), found[:, 1]
        return found[:, 0]

    def _guess(self, text: Tensor) -> Tensor | None:
        """Return the likeliest token behind `text`, [1, 1], if one token is new and there is room for two."""
        length = self.cache.length
        room = length + 2 <= min(self.capacity, self.model.context)
        if self.states is None or text.shape[1] != length + 1 or not room:
            return None
        first = length - self.states.shape[1] + 1
        states, _ = self.model.ahead(self.states, text[:, first:], 1, self.own_cache)
        (logits,) = apply_linears(states[:, -1:], (self.model.head,))
        return logits.argmax(dim=-1)
