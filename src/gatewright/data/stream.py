"""The training stream: fixed windows of packed tokens, in a new order each epoch, driven by one integer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gatewright.data.hashing import permutation
from gatewright.errors import UserError


class TokenStream:
    """Batches of `context + 1` tokens as a pure function of the batch index.

    The training documents lie in one fixed shuffled order, each followed by an end-of-text id. Window w is
    the tokens [w * context, w * context + context], so that a token is predicted once an epoch (of the
    last, incomplete window none is). Sample n of the run is window permutation(seed, n // num_windows) at
    n % num_windows, and batch i holds the samples from i * batch_size on: nothing else is remembered, so
    the index is the whole state.
    """

    def __init__(self, tokens: NDArray[np.generic], batch_size: int, context: int, seed: int = 0) -> None:
        for name, value in (("batch_size", batch_size), ("context", context)):
            if value < 1:
                raise UserError(f"{name} {value} was given; it is at least 1; give a positive number")
        self.num_windows = (len(tokens) - 1) // context if len(tokens) else 0
        if self.num_windows < 1:
            raise UserError(
                f"the training text holds {len(tokens)} tokens, less than one window of {context + 1}; "
                "give more text, a larger data fraction or a shorter context"
            )
        self.batch_size, self.context, self.seed = batch_size, context, seed
        self.num_tokens = len(tokens)
        self._tokens = tokens
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def __repr__(self) -> str:
        return (
            f"TokenStream({self.num_windows} windows of {self.context} tokens, "
            f"batch_size={self.batch_size}, seed={self.seed})"
        )

    def epoch(self, index: int) -> int:
        """Return the epoch (from 0) that the first sample of batch `index` belongs to."""
        return index * self.batch_size // self.num_windows

    def windows(self, index: int) -> NDArray[np.int64]:
        """Return the window numbers of batch `index`: [batch_size]."""
        if index < 0:
            raise ValueError(f"a batch index is at least 0, not {index}")
        samples = index * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epochs, places = samples // self.num_windows, samples % self.num_windows
        chosen = np.empty(self.batch_size, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            chosen[here] = self._permutation(epoch)[places[here]]
        return chosen

    def batch(self, index: int) -> NDArray[np.int64]:
        """Return batch `index`: int64 [batch_size, context + 1]; inputs are [:, :-1] and targets [:, 1:]."""
        starts = self.windows(index) * self.context
        places = starts[:, None] + np.arange(self.context + 1)
        return np.asarray(self._tokens[places], dtype=np.int64)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            # A batch touches two epochs, unless it is larger than the text; keep no more than two or three.
            for old in [number for number in self._permutations if abs(number - epoch) > 1]:
                del self._permutations[old]
            self._permutations[epoch] = permutation(self.num_windows, self.seed, epoch)
        return self._permutations[epoch]
