"""Routers with handed-in noise or coins, and ReMoE, by their definitions; as `slow_routers`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatewright.testing.slow_routers import Row, Weights, add, ranked, softmax


def softplus(value: Tensor) -> Tensor:
    """Return ln(1 + e^x)."""
    return (1 + value.exp()).log()


def normal_below(value: Tensor) -> Tensor:
    """Return Phi(x), the chance that a standard normal number is below."""
    return (1 + torch.erf(value / math.sqrt(2))) / 2


@dataclass(frozen=True)
class NoisyTopK:
    """2017 eq 3-5: H = logits + noise * softplus(noise_logits), the K highest of H, softmax over those."""

    deaf: bool = False
    bare_spread: bool = False
    clean_weights: bool = False
    full_softmax: bool = False

    def __call__(self, rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
        """Return who goes where."""
        found = []
        for row, noise, spread in zip(rows, options["noise"], options["noise_logits"], strict=True):
            noisy = self.noisy(row, noise, spread)
            chosen = ranked([value.item() for value in noisy], num_selected)
            weighed = row if self.clean_weights else noisy
            weights = softmax([weighed[e] for e in chosen])
            if self.full_softmax:
                scores = softmax(weighed)
                weights = [scores[e] for e in chosen]
            found.append(dict(zip(chosen, weights, strict=True)))
        return found

    def noisy(self, row: Row, noise: Tensor, spread: Tensor) -> Row:
        """Return H of one token."""
        if self.deaf:
            return row
        stds = list(spread) if self.bare_spread else [softplus(value) for value in spread]
        return [value + n * std for value, n, std in zip(row, noise, stds, strict=True)]


def chances(row: Row, noisy: Row, spread: Tensor, num_selected: int, own: bool = False) -> Row:
    """Return eq 8-9: Phi((clean - the K-th highest noisy logit of the others) / std) for each expert; the
    true counts, 1, where all are chosen. `own`: the K-th highest of all, a known mistake.
    """
    if num_selected == len(row):
        return [torch.ones((), dtype=torch.float64) for _ in row]
    found = []
    for e, clean in enumerate(row):
        others = [value for i, value in enumerate(noisy) if own or i != e]
        kth = ranked([value.item() for value in others], num_selected)[-1]
        found.append(normal_below((clean - others[kth]) / softplus(spread[e])))
    return found


@dataclass(frozen=True)
class NoisySums:
    """2017 eq 6 and 8-10: "importance" and "load", each [E]."""

    dense: bool = False
    own: bool = False
    noisy_clean: bool = False
    counted: bool = False

    def __call__(
        self, rows: list[Row], num_selected: int, options: dict[str, Any]
    ) -> dict[str, list[Tensor]]:
        """Return both."""
        rule, tokens = NoisyTopK(), NoisyTopK()(rows, num_selected, options)
        none = torch.zeros((), dtype=torch.float64)
        num_experts = options["noise"].shape[1]
        importance, load = [none] * num_experts, [none] * num_experts
        for t, row in enumerate(rows):
            spread = options["noise_logits"][t]
            noisy = rule.noisy(row, options["noise"][t], spread)
            chance = chances(noisy if self.noisy_clean else row, noisy, spread, num_selected, self.own)
            if self.counted:
                chance = [none + (e in tokens[t]) for e in range(num_experts)]
            gates = softmax(noisy) if self.dense else [tokens[t].get(e, none) for e in range(num_experts)]
            importance = [one + more for one, more in zip(importance, gates, strict=True)]
            load = [one + more for one, more in zip(load, chance, strict=True)]
        return {"importance": importance, "load": load}


@dataclass(frozen=True)
class TwoLevels:
    """2017 eq 12: num_primary noisy groups of `primary`, K / num_primary noisy experts in each; a weight is
    the product of the softmax over the chosen groups and that over the chosen experts of the group.
    """

    flat: bool = False
    no_primary_weight: bool = False
    deaf_primary: bool = False

    def __call__(self, rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
        """Return who goes where."""
        found = []
        for t, row in enumerate(rows):
            first, inner = self.levels(t, row, num_selected, options)
            token: Weights = {}
            for group, weight in first.items():
                for e, own in inner[group].items():
                    token[e] = own / len(first) if self.no_primary_weight else weight * own
            if self.flat:
                token = self._best_of_all(t, row, num_selected, options)
            found.append(token)
        return found

    def levels(
        self, t: int, row: Row, num_selected: int, options: dict[str, Any]
    ) -> tuple[Weights, dict[int, Weights]]:
        """Return one token's groups with their weights, and in each its experts with theirs."""
        primary, size = options["primary"], len(row) // options["primary"].shape[1]
        given = {"noise": options["primary_noise"][t : t + 1]}
        given["noise_logits"] = options["primary_noise_logits"][t : t + 1]
        level = NoisyTopK(deaf=self.deaf_primary)
        (first,) = level([list(primary[t])], options["num_primary"], given)
        inner = {}
        for group in first:
            place = slice(group * size, (group + 1) * size)
            own = {name: options[name][t : t + 1, place] for name in ("noise", "noise_logits")}
            (chosen,) = NoisyTopK()([row[place]], num_selected // options["num_primary"], own)
            inner[group] = {group * size + e: weight for e, weight in chosen.items()}
        return first, inner

    def _best_of_all(self, t: int, row: Row, num_selected: int, options: dict[str, Any]) -> Weights:
        """Return the K best products of both whole softmaxes, which is no two-level choice: a mistake."""
        every = {**options, "num_primary": options["primary"].shape[1]}
        first, inner = self.levels(t, row, len(row), every)
        products = {e: first[g] * weight for g, own in inner.items() for e, weight in own.items()}
        order = sorted(products)
        best = ranked([products[e].item() for e in order], num_selected)
        total = add([products[order[i]] for i in best])
        return {order[i]: products[order[i]] / total for i in best}


@dataclass(frozen=True)
class TwoLevelSums:
    """2017 eq 13-14: "importance" and "load" of every expert: Load_prim_i Load_i(X_i)_j / |X_i|."""

    secondary_alone: bool = False

    def __call__(
        self, rows: list[Row], num_selected: int, options: dict[str, Any]
    ) -> dict[str, list[Tensor]]:
        """Return both."""
        none, rule, level = torch.zeros((), dtype=torch.float64), TwoLevels(), NoisyTopK()
        num_groups, num_experts = options["primary"].shape[1], options["noise"].shape[1]
        size, inside = num_experts // num_groups, num_selected // options["num_primary"]
        importance, second = [none] * num_experts, [none] * num_experts
        first, tokens = [none] * num_groups, [0] * num_groups
        for t, (row, token) in enumerate(zip(rows, rule(rows, num_selected, options), strict=True)):
            importance = [one + token.get(e, none) for e, one in enumerate(importance)]
            clean, spread = list(options["primary"][t]), options["primary_noise_logits"][t]
            noisy = level.noisy(clean, options["primary_noise"][t], spread)
            chance = chances(clean, noisy, spread, options["num_primary"])
            first = [one + more for one, more in zip(first, chance, strict=True)]
            for group in {e // size for e in token}:
                tokens[group] += 1
                place = slice(group * size, (group + 1) * size)
                own, spread = row[place], options["noise_logits"][t][place]
                noisy = level.noisy(own, options["noise"][t][place], spread)
                for e, more in enumerate(chances(own, noisy, spread, inside), group * size):
                    second[e] = second[e] + more
        shares = [p / max(n, 1) for p, n in zip(first, tokens, strict=True)]
        if self.secondary_alone:
            shares = [none + 1] * num_groups
        return {"importance": importance, "load": [shares[e // size] * one for e, one in enumerate(second)]}


@dataclass(frozen=True)
class Coined:
    """ST-MoE appendix G: K best, g their scores over their sum; the first always, choice i > 1 if its coin is
    below g_i / threshold; weights are g, whatever is left out.
    """

    raw_coin: bool = False
    sure: bool = False
    cut: bool = False
    raw: bool = False
    after: bool = False

    def __call__(self, rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
        """Return who goes where."""
        threshold, found = options["threshold"], []
        for row, coins in zip(rows, options["later_coins"].tolist(), strict=True):
            scores = softmax(row)
            chosen = ranked([score.item() for score in scores], num_selected)
            total = add([scores[e] for e in chosen])
            token: Weights = {}
            for e, coin in zip(chosen, [0.0, *coins], strict=True):
                held = (scores[e] if self.raw_coin else scores[e] / total).item() / threshold
                if not token or self.sure or (held >= 1 if self.cut else coin < held):
                    token[e] = scores[e] if self.raw or self.after else scores[e] / total
            left = add(list(token.values()))
            found.append({e: w / left if self.after else w for e, w in token.items()})
        return found


@dataclass(frozen=True)
class Positive:
    """ReMoE: every expert whose logit is above 0, weighed by the logit itself."""

    shares: bool = False
    limited: bool = False

    def __call__(self, rows: list[Row], num_selected: int, options: dict[str, Any]) -> list[Weights]:
        """Return who goes where."""
        found = []
        for row in rows:
            order = ranked([value.item() for value in row], num_selected if self.limited else len(row))
            token = {e: row[e] for e in order if row[e].item() > 0}
            total = add(list(token.values())) if self.shares and token else 1
            found.append({e: weight / total for e, weight in token.items()})
        return found


@dataclass(frozen=True)
class Penalty:
    """ReMoE eq 7-8 and 10-11 of one layer: "penalty_loss" lambda / T sum_te f_e R_te, f_e = E / (K T) tokens
    of e; "next_penalty" lambda alpha^sign((1 - K / E) - the share of zeros), lambda given as `penalty`.
    """

    factor: str = "E / K"
    turned: bool = False
    unweighed: bool = False

    def __call__(
        self, rows: list[Row], num_selected: int, options: dict[str, Any]
    ) -> dict[str, list[Tensor]]:
        """Return both."""
        penalty, alpha = options["penalty"], options["alpha"]
        tokens = Positive()(rows, num_selected, options)
        num_tokens, num_experts = max(len(rows), 1), len(rows[0]) if rows else 1
        total = torch.zeros((), dtype=torch.float64)
        for e in range(num_experts):
            own = [token[e] for token in tokens if e in token]
            f = {"E / K": num_experts / num_selected, "E": num_experts, "1": 1}[self.factor] * len(own)
            for output in own:
                total = total + (1 if self.unweighed else f / num_tokens) * output
        used = sum(len(token) for token in tokens)
        surplus = used - num_selected * len(rows)
        sign = (surplus > 0) - (surplus < 0)
        moved = penalty * alpha ** (-sign if self.turned else sign)
        after = torch.tensor(moved, dtype=torch.float64)
        return {"penalty_loss": [penalty * total / num_tokens], "next_penalty": [after]}
