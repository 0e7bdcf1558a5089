"""Routers by their definitions: one token and one expert at a time, on Python lists of 0-d fp64 tensors.

Nothing here imports the parts that it judges. Each function takes rows of logits, K and the rule's options
and returns, per token, {expert: weight}, best first; a `Choice` with other settings is a known mistake.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = list[Tensor]
Weights = dict[int, Tensor]
# (rows of logits, K, options) -> {expert: weight} per token
Slow = Callable[[list[Row], int, dict[str, Any]], list[Weights]]
# (rows of logits, K, options) -> what the rule says to a loss, by name
SlowSums = Callable[[list[Row], int, dict[str, Any]], dict[str, list[Tensor]]]

_ROUNDS = 100


def add(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of at least one value."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def softmax(row: Row) -> Row:
    """Return e^l over the sum of all e^l."""
    highest = max(value.item() for value in row)
    powers = [(value - highest).exp() for value in row]
    total = add(powers)
    return [power / total for power in powers]


def scores_of(kind: str, row: Row) -> Row:
    """Return one token's scores."""
    if kind == "softmax":
        return softmax(row)
    if kind == "sigmoid":
        return [1 / (1 + (-value).exp()) for value in row]
    return [(1 + value.exp()).log().sqrt() for value in row]  # "sqrt_softplus"


def ranked(values: Sequence[float], count: int, highest_id: bool = False) -> list[int]:
    """Return the places of the `count` largest, largest first; among equals the lowest place."""
    sign = -1 if highest_id else 1
    return sorted(range(len(values)), key=lambda i: (-values[i], sign * i))[:count]


@dataclass(frozen=True)
class Choice:
    """Each token takes its K best experts; the settings are the rule's, the last four those of mistakes."""

    scores: str = "softmax"
    weights: str = "raw"  # or renormalised, softmax_selected
    by: str = "scores"  # or logits
    group_score: str = "max"  # or top2
    losing: float = -math.inf
    biased_weights: bool = False
    deaf_to: str = ""
    highest_id: bool = False

    def __call__(self, rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
        """Return who goes where."""
        heard = {name: value for name, value in options.items() if name not in self.deaf_to.split()}
        return [self._token(row, num_selected, **heard) for row in rows]

    def _token(self, row: Row, num_selected: int, **options: Any) -> Weights:
        order = self.order(row, **options)
        return self.weigh(row, ranked(order, num_selected, self.highest_id), **options)

    def order(
        self,
        row: Row,
        bias: Tensor | None = None,
        num_groups: int = 1,
        groups_kept: int = 1,
        **others: Any,
    ) -> list[float]:
        """Return what the experts of one token are chosen by."""
        values = [value.item() for value in (row if self.by == "logits" else scores_of(self.scores, row))]
        if bias is not None:
            values = [value + more for value, more in zip(values, bias.tolist(), strict=True)]
        return self._limited(values, num_groups, groups_kept) if groups_kept < num_groups else values

    def weigh(
        self, row: Row, chosen: list[int], scale: float = 1.0, bias: Tensor | None = None, **others: Any
    ) -> Weights:
        """Return the weights of a token's chosen experts."""
        scores = scores_of(self.scores, row)
        if self.biased_weights and bias is not None:
            scores = [score + more for score, more in zip(scores, bias.tolist(), strict=True)]
        weights = [scores[e] for e in chosen]
        if self.weights == "softmax_selected":
            weights = softmax([row[e] for e in chosen])
        elif self.weights == "renormalised":
            total = add(weights)
            weights = [weight / total if total.item() else weight for weight in weights]
        return {e: scale * weight for e, weight in zip(chosen, weights, strict=True)}

    def _limited(self, order: list[float], num_groups: int, groups_kept: int) -> list[float]:
        """Return the values with those of losing groups out of the choice."""
        size = len(order) // num_groups
        best = [sorted(order[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
        worth = [sum(group[: 2 if self.group_score == "top2" else 1]) for group in best]
        kept = ranked(worth, groups_kept)
        return [value if e // size in kept else self.losing for e, value in enumerate(order)]


@dataclass(frozen=True)
class TwoExperts:
    """GShard algorithm 1: the best expert, and the second where 2 g2 > its coin; first choices are seated
    before any second one, in token order, in `capacity` places; g1 and g2 sum to 1 before any of that.
    """

    raw_coin: bool = False
    raw_second: bool = False
    after_drop: bool = False
    by_token: bool = False

    def __call__(self, rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
        """Return who goes where."""
        coins, capacity = options["coins"].tolist(), options.get("capacity")
        loads: dict[int, int] = {}
        found: list[Weights] = [{} for _ in rows]
        tokens = [softmax(row) for row in rows]
        pairs = [ranked([value.item() for value in token], 2) for token in tokens]
        turns = [(t, place) for place in (0, 1) for t in range(len(rows))]
        for t, place in sorted(turns) if self.by_token else turns:
            first, second = (tokens[t][e] for e in pairs[t])
            total = first + second
            shares = [first / total, second if self.raw_second else second / total]
            coined = 2 * (second if self.raw_coin else shares[1]).item() > coins[t]
            if place == 1 and not coined:
                continue
            e = pairs[t][place]
            loads[e] = loads.get(e, 0) + 1
            if capacity is None or loads[e] <= capacity:
                found[t][e] = (first, second)[place] if self.after_drop else shares[place]
        if self.after_drop:
            found = [{e: w / add(list(token.values())) for e, w in token.items()} for token in found]
        return found


def top_p(rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
    """Return, at raw scores, the shortest row of best experts whose scores sum to p, at most K of them."""
    found = []
    for row in rows:
        scores, total = softmax(row), 0.0
        token: Weights = {}
        for e in ranked([score.item() for score in scores], num_selected):
            token[e] = scores[e]
            total += scores[e].item()
            if total >= options["p"]:
                break
        found.append(token)
    return found


def expert_choice(rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
    """Return, at softmax scores, each expert's min(n, ceil(K n / E)) best of the n tokens."""
    return _columns(rows, [softmax(row) for row in rows], num_selected)


def expert_choice_over_tokens(rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
    """Return the same with the softmax taken over tokens: a known mistake."""
    turned = [softmax([row[e] for row in rows]) for e in range(len(rows[0]))] if rows else []
    return _columns(rows, [[column[t] for column in turned] for t in range(len(rows))], num_selected)


def _columns(rows: list[Row], scores: list[Row], num_selected: int) -> list[Weights]:
    found: list[Weights] = [{} for _ in rows]
    num_experts = len(rows[0]) if rows else 0
    for e in range(num_experts):
        places = min(len(rows), math.ceil(num_selected * len(rows) / num_experts))
        for t in ranked([token[e].item() for token in scores], places):
            found[t][e] = scores[t][e]
    return found


def sinkhorn(rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
    """Return, at raw scores (sigmoid for K = 1, else softmax), each token's K largest entries of the plan
    d0 exp(logits) d1 whose rows sum to 1 / n and columns to 1 / E.
    """
    plan = [[math.exp(value.item()) for value in row] for row in rows]
    for _ in range(_ROUNDS):
        for token in plan:
            total = sum(token)
            token[:] = [value / total for value in token]
        for e in range(len(plan[0]) if plan else 0):
            total = sum(token[e] for token in plan)
            for token in plan:
                token[e] *= len(plan) / len(token) / total
    found = []
    for row, token in zip(rows, plan, strict=True):
        scores = scores_of("sigmoid" if num_selected == 1 else "softmax", row)
        found.append({e: scores[e] for e in ranked(token, num_selected)})
    return found


def base(rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
    """Return, at sigmoid scores, the choice of one expert each that maximises the sum of logits with equal
    loads (floor or ceiling of T / E), by trying all.
    """
    if not rows:
        return []
    num_experts, values = len(rows[0]), [[value.item() for value in row] for row in rows]
    low, high = len(rows) // num_experts, -(-len(rows) // num_experts)
    most, best = -math.inf, (0,) * len(rows)
    for taken in itertools.product(range(num_experts), repeat=len(rows)):
        if all(low <= taken.count(e) <= high for e in range(num_experts)):
            total = sum(values[t][e] for t, e in enumerate(taken))
            if total > most:
                most, best = total, taken
    return [{e: scores_of("sigmoid", row)[e]} for row, e in zip(rows, best, strict=True)]


def hashed(rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
    """Return the experts that the table holds for each token id, at 1 / K."""
    one = torch.ones((), dtype=torch.float64) / num_selected
    return [{int(e): one for e in options["table"][i].tolist()} for i in options["token_ids"].tolist()]


def hashed_and_weighed(rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
    """Return the same experts at sqrt(softplus), renormalised over them, times `scale`."""
    found = []
    for row, i in zip(rows, options["token_ids"].tolist(), strict=True):
        scores, chosen = scores_of("sqrt_softplus", row), options["table"][i].tolist()
        total = add([scores[e] for e in chosen])
        found.append({e: options["scale"] * scores[e] / total for e in chosen})
    return found
