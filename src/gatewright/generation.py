"""Continue a text with a decoder: greedy or sampled, with a key-value cache, one id at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gatewright.backbones import AheadReader, KVCache, LanguageModel, LSTMCache
from gatewright.errors import RunFailure, UserError
from gatewright.parts import MoELayer


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn; `temperature` 0 takes the likeliest, `top_k` None and `top_p` 1 keep all ids."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature}; allowed: 0 (the likeliest id) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}; allowed: above 0, up to 1 (all ids)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k}; allowed: 1 or more, or none (all ids)")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}; allowed: 0 up to 2**63 - 1")


def generate(
    model: LanguageModel,
    tokens: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: Iterable[int] = (),
    cache: bool = True,
    ahead: bool = False,
) -> list[int] | list[list[int]]:
    """Return the ids that follow `tokens`, without the stop id: a list, or one list per row of a [B, S]
    tensor.

    Args: as `stream`. Row r of a batch draws from its own random numbers (seed, r), and ends by itself.
    """
    prompts, one = _check_tokens(model, tokens)
    sampling = Sampling(temperature, top_p, top_k, seed)
    reader = _Reader(model, prompts, _check_count(max_new_tokens), cache, ahead)
    steps = _steps(reader, prompts, max_new_tokens, sampling, _check_stop(model, stop))
    out: list[list[int]] = [[] for _ in range(prompts.shape[0])]
    for ids in steps:
        for row, new in zip(out, ids, strict=True):
            if new is not None:
                row.append(new)
    return out[0] if one else out


def stream(
    model: LanguageModel,
    tokens: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: Iterable[int] = (),
    cache: bool = True,
    ahead: bool = False,
) -> Iterator[int]:
    """Return an iterator over the ids that follow one text, each as soon as it is drawn.

    Args: `tokens` are the prompt's ids, one or more; `max_new_tokens` >= 0; `temperature` >= 0, where 0 takes
    the likeliest id (the lowest of equals); `top_p` in (0, 1] keeps the smallest set of likeliest ids whose
    probability reaches it, among the `top_k` likeliest; the same `seed` draws the same ids and no global
    random state is read or changed; generation ends before an id of `stop` (end of text) or after
    `max_new_tokens`; `cache` False reads the whole text anew for each id; `ahead` lets the model's further
    block (DeepSeek-V3) guess an id, for the same ids in fewer passes, of one text.
    A text that outgrows the model's context goes on from its last context // 2 ids, which are read anew, with
    or without cache. Experts with a capacity drop nothing here: a lone token has no batch to be even with.
    Raises: UserError at the call for an argument out of range; RunFailure where the model's logits are not
    finite.
    """
    prompts, one = _check_tokens(model, tokens)
    if not one:
        raise UserError("tokens of shape [B, S] in stream; allowed: one text; use generate for a batch")
    sampling = Sampling(temperature, top_p, top_k, seed)
    reader = _Reader(model, prompts, _check_count(max_new_tokens), cache, ahead)
    steps = _steps(reader, prompts, max_new_tokens, sampling, _check_stop(model, stop))
    return (ids[0] for ids in steps if ids[0] is not None)


def next_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution that the next id is drawn from: logits [..., V] -> probabilities [..., V] fp64.

    In this order: temperature, the `top_k` likeliest, softmax, the smallest set of likeliest ids with mass >=
    `top_p`. Among equals the lowest id comes first. At temperature 0 all mass is on the first maximum.
    """
    wide = logits.double()
    if sampling.temperature == 0:
        best = wide.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(wide).scatter_(-1, best, 1.0)
    ordered, ids = torch.sort(wide / sampling.temperature, dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[..., sampling.top_k :] = -torch.inf
    mass = torch.softmax(ordered, dim=-1)
    if sampling.top_p < 1:
        before = mass.cumsum(dim=-1) - mass
        # An id stays if those before it have not reached top_p; rounding must not add one that is not needed.
        mass = torch.where(before < sampling.top_p - 1e-12, mass, 0)
        mass = mass / mass.sum(dim=-1, keepdim=True)
    return torch.zeros_like(mass).scatter_(-1, ids, mass)


def _draw(probabilities: Tensor, uniforms: np.ndarray) -> list[int]:
    """Return one id per row of [B, V]: the first whose cumulative probability exceeds the row's number."""
    edges = probabilities.cumsum(dim=-1)
    edges = edges / edges[:, -1:]
    points = torch.from_numpy(uniforms).to(edges.device).unsqueeze(-1)
    drawn: list[int] = torch.searchsorted(edges, points, right=True).squeeze(-1).tolist()
    return drawn


def _steps(
    reader: _Reader, prompts: Tensor, count: int, sampling: Sampling, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    """Yield each step's id per row, None for a row that has ended."""
    text = prompts
    rows = text.shape[0]
    # Philox is counter-based: a row's numbers depend on (seed, row) alone, not on how many rows there are.
    sources = [np.random.Generator(np.random.Philox(key=[sampling.seed, row])) for row in range(rows)]
    running = [True] * rows
    for _ in range(count):
        logits = reader.read(text).float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise RunFailure("the model's logits are not finite; generation stops; check the checkpoint")
        uniforms = np.array([source.random() for source in sources])
        drawn = _draw(next_probabilities(logits, sampling), uniforms)
        running = [on and new not in stop for on, new in zip(running, drawn, strict=True)]
        if not any(running):
            return
        yield [new if on else None for on, new in zip(running, drawn, strict=True)]
        text = torch.cat([text, torch.tensor(drawn, device=text.device).unsqueeze(-1)], dim=1)


class _Reader:
    """Reads a growing text [B, S] and gives the logits after its last id; keeps the window and the cache."""

    def __init__(
        self, model: LanguageModel, prompts: Tensor, count: int, use_cache: bool, ahead: bool
    ) -> None:
        self.model, self.use_cache = model, use_cache
        self.capacity = min(model.context, prompts.shape[1] + count)
        if ahead and (prompts.shape[0] > 1 or not use_cache):
            raise UserError("ahead with several texts or without cache; allowed: one text, with its cache")
        self.ahead = AheadReader(model, self.capacity) if ahead else None
        self.layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        self.start = 0
        self.cache: KVCache | LSTMCache | None = None

    @torch.inference_mode()
    def read(self, text: Tensor) -> Tensor:
        """Return logits [B, V] after the last id of `text`, which continues what was read before."""
        length, context = text.shape[1], self.model.context
        if length - self.start > context:
            self.start = length - max(1, context // 2)
            self.cache = None
            self.ahead = None if self.ahead is None else AheadReader(self.model, self.capacity)
        window = text[:, self.start :]
        if self.ahead is not None:
            with for_generation(self.model, self.layers):
                return self.ahead.read(window)
        if not self.use_cache:
            with for_generation(self.model, self.layers):
                return self._last_logits(window)
        if self.cache is None:
            self.cache = self.model.new_cache(text.shape[0], self.capacity)
        new = window[:, self.cache.length :]
        with for_generation(self.model, self.layers):
            return self._last_logits(new, self.cache)

    def _last_logits(self, window: Tensor, cache: KVCache | LSTMCache | None = None) -> Tensor:
        """Return logits [B, V]; Stats are taken only where somebody watches a layer."""
        watched = any(layer._forward_hooks for layer in self.layers)
        logits: Tensor = self.model(window, cache, with_stats=watched, only_last=True).logits
        return logits[:, -1]


@contextmanager
def for_generation(model: nn.Module, layers: Sequence[MoELayer]) -> Iterator[None]:
    """Evaluation mode and no capacity for one call; who stops in the middle finds the model as it was."""
    capacities = [layer.capacity for layer in layers]
    was_training = model.training
    try:
        if was_training:
            model.eval()
        for layer in layers:
            layer.capacity = None
        yield
    finally:
        for layer, capacity in zip(layers, capacities, strict=True):
            layer.capacity = capacity
        if was_training:
            model.train()


def _check_tokens(model: LanguageModel, tokens: Sequence[int] | Tensor) -> tuple[Tensor, bool]:
    """Return tokens as [B, S] int64 on the model's device, and whether they were one text."""
    if not isinstance(model, LanguageModel):
        raise UserError(
            f"a {type(model).__name__} continues no text; allowed: a decoder's run; targets of an encoder-"
            "decoder are written by gatewright.beams"
        )
    try:
        given = tokens if isinstance(tokens, Tensor) else torch.as_tensor(np.asarray(tokens))
    except (TypeError, ValueError):
        raise UserError(
            "tokens are no ids; allowed: integers, [S] or [B, S]; encode the text first"
        ) from None
    if given.numel() == 0:
        raise UserError("no tokens; allowed: one or more; begin with the end-of-text id for an empty prompt")
    if given.dim() not in (1, 2) or given.dtype.is_floating_point or given.dtype == torch.bool:
        raise UserError(
            f"tokens of shape {list(given.shape)} and {given.dtype}; allowed: integer ids, [S] or [B, S]"
        )
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise UserError(
            f"token id {wrong}; allowed: 0 to {model.vocab_size - 1}; encode with the model's own tokenizer"
        )
    one = given.dim() == 1
    batch = given.unsqueeze(0) if one else given
    return batch.to(device=model.embedding.weight.device, dtype=torch.int64), one


def _check_count(max_new_tokens: int) -> int:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens}; allowed: 0 or more")
    return max_new_tokens


def _check_stop(model: LanguageModel, stop: Iterable[int]) -> frozenset[int]:
    ids = frozenset(int(i) for i in stop)
    for wrong in sorted(i for i in ids if not 0 <= i < model.vocab_size):
        raise UserError(f"stop id {wrong}; allowed: 0 to {model.vocab_size - 1}; use the tokenizer's own eot")
    return ids


class Decodes(Protocol):
    """What TextStream needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, U+FFFD for bytes that are no whole character."""


class TextStream:
    """Turns ids into text as they come, and never shows half a character: bytes wait until theirs is whole.

    `push(id)` returns the text that has become certain ("" while a character is open); `flush()`, at the end,
    what is left, with U+FFFD for a character that stayed open. All pieces together are the text.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before, self._num_before = "", 0

    def push(self, token: int) -> str:
        """Take one id; return the text that is now certain."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        # What ends in U+FFFD may still become a character; an end of text adds nothing.
        if text.endswith("\ufffd") or len(text) <= len(self._before):
            return ""
        piece = text[len(self._before) :]
        # This piece's ids stay: some tokenizers write a leading space only if something stands before it.
        self._ids = self._ids[self._num_before :]
        self._num_before, self._before = len(self._ids), self._tokenizer.decode(self._ids)
        return piece

    def flush(self) -> str:
        """Return what is left and begin anew."""
        rest = self._tokenizer.decode(self._ids)[len(self._before) :]
        self._ids, self._before, self._num_before = [], "", 0
        return rest
