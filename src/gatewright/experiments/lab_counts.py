"""What the routers of an arm count over batches and over validation text, and how even it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gatewright.backbones import LanguageModel

Record = dict[str, Any]


def windows(texts: Mapping[str, Any], rows: int, context: int) -> Iterator[Tensor]:
    """Yield [rows, context] batches of whole windows, the domains mixed evenly."""
    found = []
    for tokens in texts.values():
        flat = torch.as_tensor(tokens, dtype=torch.int64)
        found.append(flat[: len(flat) // context * context].view(-1, context))
    fewest = min(len(own) for own in found)
    mixed = torch.stack([own[:fewest] for own in found], dim=1).flatten(0, 1)
    yield from mixed[: len(mixed) // rows * rows].split(rows)


@torch.no_grad()
def counted_over(model: LanguageModel, windows: Iterator[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return each router's counts over validation text, in evaluation mode."""
    total: dict[str, dict[str, Tensor]] = {}
    model.eval()
    for window in windows:
        for name, record in model(window).stats.items():
            own = {key: getattr(record, key) for key in ("counts", "kept", "tokens", "unrouted")}
            held = total.get(name)
            total[name] = own if held is None else {k: held[k] + v for k, v in own.items()}
    model.train()
    return total


def balance_of(steps: list[dict[str, dict[str, Tensor]]]) -> Record:
    """Return how even the load was: means over routers, and over steps where there are several.

    `max_violation` (max load - mean) / mean (Loss-Free Balancing, eq 4); `dropped` share of assignments;
    `unrouted` share of tokens; `experts_per_token` computed; `dead` experts with less than a tenth of an
    even share over all the steps.
    """
    violations, dropped, unrouted, active, dead = [], [], [], [], []
    for name in steps[0]:
        summed = sum((step[name]["counts"] for step in steps[1:]), steps[0][name]["counts"]).double()
        even = summed.sum() / summed.shape[0]
        dead.append(int((summed < even / 10).sum()))
        for step in steps:
            own = {key: value.double() for key, value in step[name].items()}
            mean = own["counts"].mean().clamp(min=1e-9)
            violations.append(float((own["counts"].max() - mean) / mean))
            made, tokens = own["counts"].sum().clamp(min=1), own["tokens"].clamp(min=1)
            dropped.append(float(1 - own["kept"].sum() / made))
            unrouted.append(float(own["unrouted"] / tokens))
            active.append(float(own["kept"].sum() / tokens))

    def mean_of(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "max_violation": mean_of(violations),
        "dropped": mean_of(dropped),
        "unrouted": mean_of(unrouted),
        "experts_per_token": mean_of(active),
        "dead": dead,
    }
