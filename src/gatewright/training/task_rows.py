"""A task as rows of ids: end-of-text ids, the text, a separator, the label and an end, all of one length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gatewright.data import Tokenizer
from gatewright.data.hashing import digest, permutation
from gatewright.data.tasks import PARTS, Example, Task
from gatewright.errors import UserError

Ids = NDArray[np.int64]
SEPARATOR = "\n= "
"""What stands between a text and its label."""


class TaskStream:
    """Batches of training rows, each epoch in a new order: a pure function of the batch index."""

    def __init__(self, rows: Ids, batch_size: int, seeds: tuple[int, ...]) -> None:
        if not 1 <= batch_size <= len(rows):
            raise UserError(f"{batch_size} rows a step; allowed: 1 to {len(rows)}, the training examples")
        self.rows, self.batch_size, self.seeds = rows, batch_size, seeds

    def batch(self, index: int) -> Ids:
        """Return batch `index`, [batch_size, S + 1]; what an epoch leaves over is left out of it."""
        epoch, place = divmod(index, len(self.rows) // self.batch_size)
        order = permutation(len(self.rows), *self.seeds, epoch)
        return self.rows[order[place * self.batch_size : (place + 1) * self.batch_size]]


class TaskRows:
    """What a trainer asks of a corpus, of a task: a row is [end .. end, text, separator | label, end .. end].

    The label begins at the same place `label_at` in every row; a text that is too long for the model's
    `context` keeps its beginning. `seed` orders the batches. `candidates` are the labels' ids, each with the
    end behind it.
    Raises: UserError where not even one id of a text fits.
    """

    domains: tuple[str, ...] = ()

    def __init__(self, task: Task, tokenizer: Tokenizer, context: int, seed: int = 0) -> None:
        self.task, self.tokenizer, self.seed, end = task, tokenizer, seed, tokenizer.eot
        self.candidates = [[*tokenizer.encode(label).tolist(), end] for label in task.labels]
        self._separator = tokenizer.encode(SEPARATOR)
        texts = {part: self._encoded(task.parts[part]) for part in PARTS}
        longest = max(len(ids) for own in texts.values() for ids in own)
        self._tail = max(len(ids) for ids in self.candidates)
        room = context - self._tail - len(self._separator)
        if room < 1:
            raise UserError(
                f"context {context} has no room for a text with its label; allowed: {context - room + 1} or "
                "more; train the model with a longer context"
            )
        self._text = min(longest, room)
        self.label_at = 1 + self._text + len(self._separator)
        self.prompts = {part: np.stack([self._prompt(ids) for ids in own]) for part, own in texts.items()}
        self.labels = {part: np.array([one.label for one in task.parts[part]]) for part in PARTS}
        self.fingerprint = digest([task.fingerprint, tokenizer.to_json(), SEPARATOR, str(self._text)])

    @property
    def window(self) -> int:
        """Predicted tokens of a row."""
        return self.label_at + self._tail - 1

    def _encoded(self, examples: Sequence[Example]) -> list[Ids]:
        return self.tokenizer.encode_documents([one.text for one in examples])

    def _prompt(self, ids: Ids) -> Ids:
        row = np.full(self.label_at, self.tokenizer.eot, dtype=np.int64)
        own = np.concatenate([ids[: self._text], self._separator])
        row[len(row) - len(own) :] = own
        return row

    def rows(self, part: str) -> Ids:
        """Return prompts with their right labels, [N, window + 1]."""
        tails = np.full((len(self.candidates), self._tail), self.tokenizer.eot, dtype=np.int64)
        for place, ids in enumerate(self.candidates):
            tails[place, : len(ids)] = ids
        return np.concatenate([self.prompts[part], tails[self.labels[part]]], axis=1)

    def stream(self, batch_size: int, context: int, *, seed: int = 0, fraction: float = 1.0) -> TaskStream:
        """Return the training stream over the first `fraction` of the examples."""
        rows = self.rows("train")
        return TaskStream(rows[: max(1, round(fraction * len(rows)))], batch_size, (seed, self.seed))
