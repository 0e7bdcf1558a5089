"""Losses' cases: batches whose value is worked by hand, and random ones for the slow definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gatewright.testing.cases import powers
from gatewright.testing.slow_losses import LOSSES, Seen, Setting, mean

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Batch:
    """Logits [L, T, E] fp64, experts [L, T, K] of each token, and the keywords that go with them. `value` by
    hand, or None for the slow one. `chosen_anew`: the experts are not those of the highest logits.
    """

    name: str
    logits: Tensor
    experts: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    value: float | None = None
    chosen_anew: bool = False

    @property
    def facts(self) -> dict[str, int]:
        """The numbers that a factor may be made of."""
        layers, tokens, experts = self.logits.shape
        return {"L": layers, "T": tokens, "E": experts, "K": self.experts.shape[2]}


def slow_value(loss: str, batch: Batch, setting: Setting, logits: Tensor | None = None) -> Tensor:
    """Return the loss by its definition, mean over layers; `logits` stand in for the batch's own."""
    values = batch.logits if logits is None else logits
    length = batch.options.get("sequence_length", max(values.shape[1], 1))
    layers = []
    for rows, chosen in zip(values, batch.experts.tolist(), strict=True):
        real = [t for t in range(len(chosen)) if batch.mask is None or setting.padding or bool(batch.mask[t])]
        layers.append(
            Seen(
                values.shape[2],
                [list(rows[t]) for t in real],
                [chosen[t] for t in real],
                [t // length for t in real],
            )
        )
    if setting.pooled:
        layers = [
            Seen(
                values.shape[2],
                [row for seen in layers for row in seen.rows],
                [chosen for seen in layers for chosen in seen.chosen],
                [at for seen in layers for at in seen.sequence],
            )
        ]
    return mean([LOSSES[loss](seen, setting) for seen in layers])


def _batch(
    name: str, rows: list[Numbers], experts: list[list[int]], value: float, anew: bool = False, **options: Any
) -> Batch:
    logits = torch.tensor([rows], dtype=torch.float64)
    return Batch(name, logits, torch.tensor([experts]), options, value=value, chosen_anew=anew)


_FLAT: list[Numbers] = [(0.0, 0.0, 0.0, 0.0)] * 4
_EACH, _TWO_EACH = [[0], [1], [2], [3]], [[0, 1], [2, 3], [0, 2], [1, 3]]
# Softmax 0.7, 0.1, 0.1, 0.1 and 3/4, 1/4 or the other way round.
_SURE, _ALL_TO_0 = [powers(7, 1, 1, 1)] * 4, [[0]] * 4
_LEFT, _RIGHT = powers(3, 1), powers(1, 3)
# f = (3/4, 1/4), P = (5/8, 3/8).
_MIXED, _MIXED_TO = [_LEFT, _LEFT, _LEFT, _RIGHT], [[0], [0], [0], [1]]
_PAIRS, _PAIRS_TO = [powers(4, 2, 1), powers(4, 1, 2)], [[0, 1], [0, 2]]
_LN4, _LN2 = math.log(4), math.log(2)


def _balance(**options: Any) -> tuple[Batch, ...]:
    return (
        _batch("balanced, K = 1: 1", _FLAT, _EACH, 1.0, **options),
        _batch("balanced, K = 2: 1", _FLAT, _TWO_EACH, 1.0, **options),
        _batch("all to one at 0.7: 4 * 0.7", _SURE, _ALL_TO_0, 2.8, **options),
    )


_BY_HAND: dict[str, tuple[Batch, ...]] = {
    "balance": (
        *_balance(),
        # 2 * (15/32 + 3/32)
        _batch("three of four tokens to expert 0: 9/8", _MIXED, _MIXED_TO, 9 / 8),
        # f = (2, 1, 1) / 4, P = (4/7, 3/14, 3/14): 3 * (4/14 + 3/56 + 3/56)
        _batch("K = 2 of 3, expert 0 in both: 33/28", _PAIRS, _PAIRS_TO, 33 / 28),
        # f = (1/2, 1/2): 2 * (3/8 + 1/8)
        _batch("even choices against uneven scores: 1", [_LEFT] * 2, [[0], [1]], 1.0, anew=True),
    ),
    "sequence_balance": (
        *_balance(sequence_length=4),
        # First sequence 2 * 3/4, second 1; over all four tokens it would be 9/8.
        _batch("sequences of 3/2 and 1: 5/4", _MIXED, _MIXED_TO, 5 / 4, sequence_length=2),
    ),
    "gshard": (
        *_balance(sequence_length=4),
        # First choices (2, 0, 0), c / S = (1, 0, 0): 3 * 4/7. As printed 4/21; of all choices 33/28.
        _batch("first choices alone: 12/7", _PAIRS, _PAIRS_TO, 12 / 7, sequence_length=2),
        _batch("sequences of 3/2 and 1: 5/4", _MIXED, _MIXED_TO, 5 / 4, sequence_length=2),
    ),
    "z": (
        _batch("logits 0: (ln 4)^2", _FLAT, _EACH, _LN4**2),
        _batch("logits 0, ln 3: the same sum of powers", [powers(1, 3)], [[1]], _LN4**2),
        _batch(
            "sums of powers 4 and 2: the mean of squares",
            [powers(1, 3), (0.0, 0.0)],
            [[1], [0]],
            (_LN4**2 + _LN2**2) / 2,
        ),
    ),
    "importance": (
        _batch("balanced: 0", _FLAT, _EACH, 0.0),
        # P = 0.7, 0.1, 0.1, 0.1: mean 0.25, variance (0.45^2 + 3 * 0.15^2) / 4 = 0.0675; / 0.0625
        _batch("all to one at 0.7: 1.08", _SURE, _ALL_TO_0, 1.08),
        # Sums (5/2, 3/2): mean 2, variance 1/4.
        _batch("sums 5/2 and 3/2: 1/16", _MIXED, _MIXED_TO, 1 / 16),
    ),
    "load": (
        _batch("balanced: 0", _FLAT, _EACH, 0.0),
        # Loads (4, 0, 0, 0): mean 1, variance (9 + 3) / 4 = 3.
        _batch("all to one of 4: E - 1", _SURE, _ALL_TO_0, 3.0),
        # Loads (3, 1): mean 2, variance 1.
        _batch("loads 3 and 1: 1/4", _MIXED, _MIXED_TO, 1 / 4),
    ),
    "device": (
        _batch("balanced, K = 1: 1", _FLAT, _EACH, 1.0, num_devices=2),
        _batch("balanced, K = 2: 1", _FLAT, _TWO_EACH, 1.0, num_devices=2),
        # f = (2, 2, 0, 0): f' = (2, 0); P' = (0.8, 0.2).
        _batch(
            "all to one device, evenly inside: 1.6",
            [powers(4, 4, 1, 1)] * 2,
            [[0], [1]],
            1.6,
            anew=True,
            num_devices=2,
        ),
        # Counts (3, 0, 0, 1): f' = (3/2, 1/2); P' = (5/8, 3/8).
        _batch(
            "f' 3/2, 1/2 and P' 5/8, 3/8: 9/8",
            [powers(5, 1, 1, 1)] * 3 + [powers(1, 1, 1, 5)],
            [[0], [0], [0], [3]],
            9 / 8,
            num_devices=2,
        ),
    ),
    "communication": (
        _batch("balanced, one device each: 1", _FLAT, _EACH, 1.0, num_devices=2, devices_kept=1),
        # Received (2, 1); f'' = 2 / (2 * 2) * (2, 1); P'' = (11/16, 5/16).
        _batch(
            "a token whose experts share a device counts once: 27/32",
            [powers(4, 2, 1, 1), powers(4, 1, 2, 1)],
            [[0, 1], [0, 2]],
            27 / 32,
            num_devices=2,
            devices_kept=2,
        ),
        # All to device 0 at 0.8: f'' = (2, 0).
        _batch("all to one device at 0.8: 1.6", _SURE, _ALL_TO_0, 1.6, num_devices=2, devices_kept=1),
    ),
}
# (L, T, E, K, sequence length, devices): random batches.
_SHAPES = (
    (1, 8, 4, 1, 4, 2),
    (1, 6, 5, 2, 3, 5),
    (1, 12, 8, 3, 4, 4),
    (1, 4, 2, 1, 2, 2),
    (1, 3, 3, 3, 3, 1),
)
_LAYERED = ((3, 8, 4, 2, 4, 2), (2, 6, 5, 1, 3, 5))


def by_hand(loss: str) -> tuple[Batch, ...]:
    """Return the batches whose value is worked by hand."""
    return _BY_HAND[loss]


def of_layers(loss: str) -> Iterator[Batch]:
    """Yield batches of several layers: the mean of what each layer's loss is."""
    for batch in _BY_HAND[loss]:
        both = batch.logits.repeat(2, 1, 1), batch.experts.repeat(2, 1, 1)
        yield Batch(
            f"two layers alike, {batch.name}", *both, batch.options, None, batch.value, batch.chosen_anew
        )
    if loss == "balance":
        # Each layer is 2 * 3/4; pooled they would be even, and 1.
        opposite = torch.tensor([[_LEFT, _LEFT], [_RIGHT, _RIGHT]], dtype=torch.float64)
        told = "two layers whose imbalances cancel: 3/2 each"
        yield Batch(told, opposite, torch.tensor([[[0], [0]], [[1], [1]]]), value=3 / 2)
    yield from random_batches(loss, layers=True)


def random_batches(loss: str, layers: bool = False) -> Iterator[Batch]:
    """Yield random batches, the same on every run, with top-K choices, then one with choices of its own."""
    source = torch.Generator().manual_seed(1)
    for shape in _LAYERED if layers else _SHAPES:
        for anew in (False, True) if shape == _SHAPES[1] else (False,):
            num_layers, tokens, experts, places, length, devices = shape
            # In steps of 1/16, skewed: distinct per token, and exact in every dtype.
            drawn = torch.rand(num_layers, tokens, experts, generator=source, dtype=torch.float64)
            logits = drawn.argsort(dim=2).double() / 2 - torch.arange(experts) / 16
            order = (drawn if anew else logits).argsort(dim=2, descending=True)
            options: dict[str, Any] = {}
            if loss in ("sequence_balance", "gshard"):
                options["sequence_length"] = length
            if loss in ("device", "communication"):
                options["num_devices"] = devices
            if loss == "communication":
                options["devices_kept"] = max(1, devices // 2)
            told = f"{tokens} random tokens, K = {places} of {experts}"
            told = f"{num_layers} layers of {told}" if layers else told
            told += ", choices that are not the highest scores" if anew else ""
            yield Batch(told, logits, order[:, :, :places], options, chosen_anew=anew)


def masked(batch: Batch) -> Batch:
    """Return the same batch with every third token padding."""
    mask = torch.arange(batch.logits.shape[1]) % 3 != 1
    return Batch(
        f"{batch.name}, with padding",
        batch.logits,
        batch.experts,
        batch.options,
        mask,
        chosen_anew=batch.chosen_anew,
    )
