"""Hash routing and balanced tables, one token id at a time."""

from __future__ import annotations

from torch import Tensor

from tests.oracle.group_limited import weigh


def balanced(frequencies: list[int], num_experts: int, num_selected: int) -> list[list[int]]:
    """Return each id's experts: ids by falling frequency, each on the lightest experts; among equals on those
    with fewest ids, then on the lowest.
    """
    load, held = [0] * num_experts, [0] * num_experts
    table: list[list[int]] = [[] for _ in frequencies]
    waiting = list(range(len(frequencies)))
    while waiting:
        token = waiting[0]
        for other in waiting:
            if frequencies[other] > frequencies[token]:
                token = other
        waiting.remove(token)
        table[token] = sorted(range(num_experts), key=lambda e: (load[e], held[e], e))[:num_selected]
        for e in table[token]:
            load[e] += frequencies[token]
            held[e] += 1
    return table


def weights(scores: list[Tensor], row: list[int], form: str, scale: float) -> list[Tensor]:
    """Return the combine weights of one token whose id stands for `row`."""
    if form == "uniform":
        return [scores[0].detach() * 0 + 1 / len(row) for _ in row]
    return weigh(scores, row, "renormalised", scale)
