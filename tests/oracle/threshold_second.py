"""ST-MoE's top-n routing (appendix G), slowly: one token, one choice at a time, coin numbers handed in."""

from __future__ import annotations

from torch import Tensor

from tests.oracle.moe import best, number, softmax


def top_n(
    logits: list[Tensor], num_selected: int, threshold: float, policy: str, coins: list[float] | None
) -> tuple[list[int], list[Tensor], list[bool]]:
    """Return the n best experts of one token, their weights, and which of them are used.

    Args: `coins`: one number in [0, 1) per later choice, for the policy "random"; none flips no coin.
    """
    scores = softmax(logits)
    chosen = best(scores, num_selected)
    total = scores[chosen[0]]
    for e in chosen[1:]:
        total = total + scores[e]
    weights = [scores[e] / total for e in chosen]
    used = [True]
    for i in range(1, num_selected):
        gate = number(weights[i])
        if policy == "threshold":
            used.append(gate >= threshold)
        elif policy == "random" and coins is not None:
            used.append(coins[i - 1] < min(1.0, gate / threshold))
        else:
            used.append(True)
    return chosen, weights, used
