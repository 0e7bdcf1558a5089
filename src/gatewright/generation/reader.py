"""Reading a growing text: the logits after its last id, with a cache that outlives one generation."""

from __future__ import annotations

import torch
from torch import Tensor

from gatewright.backbones import AheadReader, KVCache, LanguageModel, LSTMCache
from gatewright.errors import UserError
from gatewright.evaluation.undropped import for_generation
from gatewright.parts import MoELayer, Stats


class Reader:
    """Reads growing texts [B, S] and gives the logits after their last id; keeps the window and the cache.

    Args: `capacity`: positions that the cache holds at first, up to the model's context; `use_cache` False
    reads the whole text each time; `ahead`: as `stream`; `capture` keeps in `stats` what the routers chose in
    the last pass. `passed` counts the ids that the model has been given.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        capacity: int,
        *,
        use_cache: bool = True,
        ahead: bool = False,
        capture: bool = False,
    ) -> None:
        self.model, self.rows, self.use_cache, self.capture = model, rows, use_cache, capture
        self.capacity = min(model.context, capacity)
        if ahead and (rows > 1 or not use_cache):
            raise UserError("ahead with several texts or without cache; allowed: one text, with its cache")
        if ahead and capture:
            raise UserError(
                "ahead with the routing shown; allowed: one of them, as a guess is routed as well"
            )
        self.ahead = AheadReader(model, self.capacity) if ahead else None
        self.layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        self.start, self.passed = 0, 0
        self.cache: KVCache | LSTMCache | None = None
        self.read_text: Tensor | None = None
        self.stats = Stats()

    @torch.inference_mode()
    def read(self, text: Tensor) -> Tensor:
        """Return logits [B, V] after the last id of `text`, which continues what was read before."""
        length, context = text.shape[1], self.model.context
        if length - self.start > context:
            self._begin_anew(length - max(1, context // 2))
        window = text[:, self.start :]
        with for_generation(self.model, self.layers):
            if self.ahead is not None:
                logits = self.ahead.read(window)
            elif self.use_cache:
                logits = self._continue(window)
            else:
                logits = self._last_logits(window)
        self.read_text = text
        return logits

    def go_on_with(self, text: Tensor, capacity: int) -> int:
        """Get ready to read `text`, another one, up to `capacity` positions; return how many of its first ids
        need not be read again, as the cache holds them.
        """
        known, kept = self.read_text, 0
        if self.cache is not None and known is not None and not self.start:
            # One id at least is read, for the logits behind it.
            most = min(known.shape[1], text.shape[1] - 1)
            same = (known[:, :most] == text[:, :most]).all(dim=0)
            kept = int(same.long().cumprod(dim=0).sum())
            if isinstance(self.cache, LSTMCache) and kept < known.shape[1]:
                kept = 0  # a state cannot be taken back
        if not kept or self.cache is None:
            self._begin_anew(0)
        elif isinstance(self.cache, KVCache):
            self.cache.cut(kept)
        self.read_text = text[:, :kept]
        self._reserve(min(self.model.context, capacity))
        return kept

    def _reserve(self, capacity: int) -> None:
        """Make room in the cache for `capacity` positions; twice as many as there were, if it must grow."""
        if capacity <= self.capacity:
            return
        self.capacity = min(self.model.context, max(capacity, 2 * self.capacity))
        if isinstance(self.cache, KVCache):
            larger = self.model.new_cache(self.rows, self.capacity)
            assert isinstance(larger, KVCache)
            larger.take_over(self.cache)
            self.cache = larger

    def _begin_anew(self, start: int) -> None:
        self.start, self.cache, self.read_text = start, None, None
        self.ahead = None if self.ahead is None else AheadReader(self.model, self.capacity)

    def _continue(self, window: Tensor) -> Tensor:
        """Return the logits after `window`, of which the cache holds all but what is new."""
        if self.cache is None:
            self.cache = self.model.new_cache(self.rows, self.capacity)
        before = self.cache.length
        try:
            return self._last_logits(window[:, before:], self.cache)
        except BaseException:
            # Whoever interrupts a pass leaves layers that hold more than others.
            if isinstance(self.cache, KVCache):
                self.cache.cut(before)
            else:
                self.cache = None
            raise

    def _last_logits(self, window: Tensor, cache: KVCache | LSTMCache | None = None) -> Tensor:
        """Return logits [B, V]; Stats are taken only where somebody watches a layer."""
        watched = self.capture or any(layer._forward_hooks for layer in self.layers)
        output = self.model(window, cache, self.capture, with_stats=watched, only_last=True)
        self.passed += window.shape[0] * window.shape[1]
        self.stats = output.stats
        last: Tensor = output.logits[:, -1]
        return last
