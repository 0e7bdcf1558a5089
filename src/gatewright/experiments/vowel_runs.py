"""Runs on the vowels: cases under each reading of the paper, and what a batch of runs came to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from torch import Tensor

from gatewright.data.vowels import Vowels, peterson_barney
from gatewright.experiments.descent import Descent, descend
from gatewright.papers import get_paper
from gatewright.training.seeded import drawn

Record = dict[str, Any]

TRAIN, TEST = range(1, 51), range(51, 76)
# The largest share that the gate gives an expert on any case; below it the expert counts as unused.
ALIVE = 0.05


@dataclass(frozen=True)
class Reading:
    """How the vowels are coded: those of `ones` as 1 in one logistic output, or, where it is None, each as a
    class of its own in four softmax outputs. `reached` is the criterion on the summed squared error.
    """

    name: str
    about: str
    ones: tuple[int, int] | None
    reached: float

    def cases(self, vowels: Vowels) -> tuple[Tensor, Tensor]:
        """Return formants in kHz [T, 2] and targets [T, 1] or [T, 4], in fp64."""
        x, vowel = torch.from_numpy(vowels.formants / 1000), torch.from_numpy(vowels.vowel)
        if self.ones is None:
            return x, torch.nn.functional.one_hot(vowel, 4).double()
        return x, torch.isin(vowel, torch.tensor(self.ones)).double().unsqueeze(-1)

    def settings(self, size: str, init: float) -> Any:
        """Return a published system with this reading's outputs."""
        own = get_paper("local_experts").PUBLISHED[size]
        outputs = {} if self.ones else {"num_outputs": 4, "squash": "softmax"}
        return dataclasses.replace(own, init=init, **outputs)


READINGS = {
    "A": Reading("A", "one logistic output, [i] and [a] are 1, [I] and [^] are 0", (0, 2), 0.08),
    "A, crossed": Reading(
        "A, crossed", "one logistic output, [i] and [^] are 1, [I] and [a] 0", (0, 3), 0.08
    ),
    "B": Reading("B", "four softmax outputs, one per vowel; criterion on half the squared error", None, 0.16),
}


def run_batch(
    reading: Reading, size: str, init: float, limit: int, runs: Iterable[tuple[int, float]]
) -> Record:
    """Return what each run (seed, step size) of one system came to, as plain lists in the order given."""
    started = process_time()
    seeds, rates = zip(*runs, strict=True)
    paper = get_paper("local_experts")
    settings = reading.settings(size, init)
    train, test = (reading.cases(peterson_barney().of_speakers(who)) for who in (TRAIN, TEST))
    models = [drawn(lambda: paper.build(settings), seed) for seed in seeds]
    done = descend(models, paper.objective(settings), train, rates, limit=limit, reached=reading.reached)
    return {
        "seeds": list(seeds),
        "rates": list(rates),
        "epochs": [None if epochs < 0 else epochs for epochs in done.epochs.tolist()],
        "squared_error": done.squared_error.tolist(),
        "train_percent": percents_right(done, train),
        "test_percent": percents_right(done, test),
        "survivors": _survivors(done, train[0]),
        "cpu_seconds": process_time() - started,
    }


def percents_right(done: Descent, cases: tuple[Tensor, Tensor]) -> list[float]:
    """Return each run's share of cases whose blend is right: above 1/2, or the largest of the classes."""
    x, targets = cases
    blend = done.answer(x).blend
    if targets.shape[-1] == 1:
        right = ((blend > 0.5) == (targets > 0.5)).squeeze(-1)
    else:
        right = blend.argmax(-1) == targets.argmax(-1)
    return (100 * right.double().mean(-1)).tolist()


def _survivors(done: Descent, x: Tensor) -> list[int]:
    """Return how many experts of each run the gate still uses on some case."""
    largest = torch.softmax(done.answer(x).logits, -1).amax(dim=1)
    return (largest > ALIVE).sum(-1).tolist()


def best_rate(batch: Record, rates: Sequence[float]) -> float | None:
    """Return the step size with the fewest epochs on average, of those at which every run came through."""
    means = {}
    for rate in rates:
        own = [e for e, used in zip(batch["epochs"], batch["rates"], strict=True) if used == rate]
        if None not in own:
            means[rate] = sum(own) / len(own)
    return min(means, key=lambda rate: means[rate]) if means else None
