"""What a router does, in numbers: specialisation, co-activation, saturation, repetition, balance.

Every function is pure and takes tensors or arrays. `experts` is [T, K]: the ids each token selected, first
choice first; -1 marks an empty slot. Results are numpy arrays of float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np


def _array(values: Any) -> np.ndarray:
    """Return a numpy array from a tensor on any device, an array or nested lists."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def _experts(experts: Any, num_experts: int | None = None) -> np.ndarray:
    chosen = _array(experts)
    if chosen.ndim != 2:
        raise ValueError(f"experts has shape {chosen.shape}; expected [T, K]")
    if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"experts has dtype {chosen.dtype}; expected integer ids")
    if num_experts is not None and chosen.size and (chosen.max() >= num_experts or chosen.min() < -1):
        raise ValueError(f"expert ids span {chosen.min()}..{chosen.max()}; expected -1..{num_experts - 1}")
    return chosen.astype(np.int64)


def selected(experts: Any, num_experts: int) -> np.ndarray:
    """Return [T, E] bool: whether the token selected the expert. An expert selected twice counts once."""
    chosen = _experts(experts, num_experts)
    hits = np.zeros((len(chosen), num_experts + 1), dtype=bool)
    np.put_along_axis(hits, chosen, True, axis=1)  # -1 lands in the last column, which is cut off
    return hits[:, :num_experts]


def chance(num_experts: int, num_selected: int) -> float:
    """Return the share of tokens that select an expert under uniform choice: K/E."""
    return num_selected / num_experts


def domain_specialisation(experts: Any, num_experts: int) -> np.ndarray:
    """Return [E]: the share of one domain's tokens that select each expert; sums to K. Chance is K/E.

    Equation: domain specialisation(E_i, D) = N^(k)_{E_i,D} / N_D (Muennighoff et al. 2024, sec. 5), where N_D
        counts the tokens of domain D and N^(k) those of them with E_i among their K selected.
    Args: experts [T, K] of one domain's tokens.
    Raises: ValueError without a token, where the share has no meaning.
    """
    hits = selected(experts, num_experts)
    if not len(hits):
        raise ValueError("domain specialisation of no tokens; give at least one")
    return hits.mean(axis=0)


class Vocabulary(NamedTuple):
    """Token ids [N] that occur often enough, how often [N], and the share that selects each expert [N, E]."""

    ids: np.ndarray
    counts: np.ndarray
    shares: np.ndarray


def vocabulary_specialisation(
    experts: Any, token_ids: Any, num_experts: int, *, least: int = 10
) -> Vocabulary:
    """Return for each token id the share of its occurrences that select each expert.

    Equation: vocabulary specialisation(E_i, x) = N^(k)_{x,E_i} / N_x (Muennighoff et al. 2024, sec. 5). With
        the input tokens as `token_ids` it is the input variant; with the next or predicted, the output one.
    Args: experts [T, K]; token_ids [T]; least: ids with fewer occurrences are left out (the paper's 10).
    """
    hits = selected(experts, num_experts)
    ids, inverse, counts = np.unique(_array(token_ids).reshape(-1), return_inverse=True, return_counts=True)
    if len(inverse) != len(hits):
        raise ValueError(f"{len(inverse)} token ids for {len(hits)} rows of experts; give one each")
    totals = np.zeros((len(ids), num_experts))
    np.add.at(totals, inverse, hits)
    kept = counts >= least
    return Vocabulary(ids[kept], counts[kept], totals[kept] / counts[kept, None])


def coactivation(experts: Any, num_experts: int) -> np.ndarray:
    """Return [E, E]: of the tokens that select expert i, the share that also select j. Not symmetric.

    Equation: co-activation(E_i, E_j) = N_{E_i,E_j} / N_{E_i} (Muennighoff et al. 2024, sec. 5). The diagonal
        is 0 here, since an expert with itself says nothing; the row of an unused expert is 0.
    """
    return coactivation_shares(coactivation_counts(experts, num_experts))


def coactivation_counts(experts: Any, num_experts: int) -> np.ndarray:
    """Return [E, E]: how many tokens select both experts, on the diagonal how many select the one. Counts of
    several texts add up.
    """
    hits = selected(experts, num_experts).astype(np.float64)
    return hits.T @ hits


def coactivation_shares(counts: np.ndarray) -> np.ndarray:
    """Return `coactivation` of what `coactivation_counts` counted."""
    both = counts.astype(np.float64)
    alone = both.diagonal().copy()
    np.fill_diagonal(both, 0.0)
    return np.divide(both, alone[:, None], out=np.zeros_like(both), where=alone[:, None] > 0)


def router_saturation(early: Any, final: Any) -> float:
    """Return how much of the final choice a checkpoint already made, between 0 and 1. Chance is K/E.

    Equation: saturation(t) = 1/N sum_n |E_n^(t) cap E_n^(T)| / k (Muennighoff et al. 2024, sec. 5).
    Args: early, final [T, K]: experts of the same tokens in the same order at step t and at the end.
    """
    before, after = _experts(early), _experts(final)
    if before.shape != after.shape or not before.size:
        raise ValueError(f"shapes {before.shape} and {after.shape}; expected one non-empty [T, K] for both")
    shared = (before[:, :, None] == after[:, None, :]) & (before[:, :, None] >= 0)
    return float(shared.any(axis=2).sum() / before.size)


class Repetition(NamedTuple):
    """Share of consecutive pairs with the same first choice, with any common expert, and both by chance."""

    first: float
    any_common: float
    first_chance: float
    any_common_chance: float


def repetition(experts: Any, num_experts: int) -> Repetition:
    """Return how often two consecutive tokens go to the same expert.

    Equation: first choice: mean over t of [e_{t,1} = e_{t+1,1}], by chance 1/E. First or second (any of the
        K): mean of [selected sets intersect], by chance 1 - C(E-K, K) / C(E, K) (Jiang et al. 2024, table 5:
        for 8 experts and K = 2, 46.4 %). Chance assumes even use; skewed use repeats more, shuffled or not.
    Args: experts [T, K] of consecutive tokens of one text; pairs across two texts do not belong in it.
    """
    chosen = _experts(experts, num_experts)
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} token; repetition needs two consecutive ones")
    width = chosen.shape[1]
    here, there = chosen[:-1], chosen[1:]
    common = (here[:, :, None] == there[:, None, :]) & (here[:, :, None] >= 0)
    disjoint = math.comb(num_experts - width, width) / math.comb(num_experts, width)
    return Repetition(
        float(((here[:, 0] == there[:, 0]) & (here[:, 0] >= 0)).mean()),
        float(common.any(axis=(1, 2)).mean()),
        1 / num_experts,
        1 - disjoint,
    )


def load_share(counts: Any) -> np.ndarray:
    """Return the share of assignments of each expert, along the last axis; zeros where nothing was assigned.

    Equation: f_i = counts_i / sum_j counts_j; even is 1/E.
    """
    values = _array(counts).astype(np.float64)
    total = values.sum(axis=-1, keepdims=True)
    return np.divide(values, total, out=np.zeros_like(values), where=total > 0)


def load_entropy(counts: Any) -> np.ndarray:
    """Return the entropy of the load divided by log E: 1 when even, 0 when one expert takes all (or E = 1).

    Equation: H = -sum_i f_i ln f_i / ln E, along the last axis.
    """
    shares = load_share(counts)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    width = shares.shape[-1]
    return -(shares * logs).sum(axis=-1) / math.log(width) if width > 1 else np.zeros(shares.shape[:-1])


def load_variation(counts: Any) -> np.ndarray:
    """Return the coefficient of variation of the load: 0 when even, sqrt(E - 1) when one expert takes all.

    Equation: CV = std(f) / mean(f), population standard deviation, along the last axis.
    """
    shares = load_share(counts)
    return shares.std(axis=-1) * shares.shape[-1] * (shares.sum(axis=-1) > 0)


def max_over_mean(counts: Any) -> np.ndarray:
    """Return the largest load over the mean load: 1 when even, E when one expert takes all.

    Equation: E * max_i f_i, along the last axis.
    """
    shares = load_share(counts)
    return shares.max(axis=-1) * shares.shape[-1]
