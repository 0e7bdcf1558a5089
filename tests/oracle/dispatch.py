"""A slow, independent dispatch: one group, one queue, one choice at a time."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Queue:
    """Choices as plain lists: `rows` [T][K] of expert ids or -1, `weights` [T][K], `withdrawn` [T][K]."""

    rows: list[list[int]]
    weights: list[list[float]]
    withdrawn: list[list[bool]]
    num_experts: int
    group_size: int | None = None
    order: str = "position"

    def groups(self) -> list[list[int]]:
        """Return the tokens of each routing group."""
        size = self.group_size or max(len(self.rows), 1)
        return [
            list(range(start, min(start + size, len(self.rows)))) for start in range(0, len(self.rows), size)
        ]

    def line(self, tokens: list[int]) -> list[tuple[int, int]]:
        """Return the (token, rank) of a group in the order in which they are served, empty ones left out."""
        if self.order == "batch_priority":
            tokens = self._by_weight(tokens)
        ranks = range(len(self.rows[0]) if self.rows else 0)
        if self.order == "position":
            line = [(t, rank) for t in tokens for rank in ranks]
        else:
            line = [(t, rank) for rank in ranks for t in tokens]
        return [(t, rank) for t, rank in line if self.rows[t][rank] >= 0]

    def _by_weight(self, tokens: list[int]) -> list[int]:
        """Return tokens by their highest weight, each inserted behind those that are not below it."""
        highest = {}
        for t in tokens:
            own = [w for w, e in zip(self.weights[t], self.rows[t], strict=True) if e >= 0]
            highest[t] = max(own) if own else -float("inf")
        found: list[int] = []
        for t in tokens:
            at = 0
            while at < len(found) and highest[found[at]] >= highest[t]:
                at += 1
            found.insert(at, t)
        return found


def places(factor: str, num_tokens: int, num_experts: int, counted: int, minimum: int, multiple: int) -> int:
    """Return C for a factor written as a decimal; `counted` is K, or 1 where the convention omits it."""
    share = Fraction(factor) * counted * num_tokens
    held = 0
    while held * num_experts < share or held < minimum or held % multiple:
        held += 1
    return held


def serve(queue: Queue, limits: list[int]) -> tuple[list[list[int]], list[list[bool]]]:
    """Return how many stood before each choice, and who is computed; `limits` holds C per group."""
    ahead = [[-1] * len(row) for row in queue.rows]
    kept = [[False] * len(row) for row in queue.rows]
    for tokens, limit in zip(queue.groups(), limits, strict=True):
        came = [0] * queue.num_experts
        for t, rank in queue.line(tokens):
            e = queue.rows[t][rank]
            ahead[t][rank] = came[e]
            kept[t][rank] = came[e] < limit and not queue.withdrawn[t][rank]
            came[e] += 1
    return ahead, kept


def reroute(
    queue: Queue, scores: list[list[float]], limits: list[int]
) -> tuple[list[list[int]], list[list[bool]]]:
    """Return where each choice ends, [T][K], and who has a place there (Switch Transformer, appendix B)."""
    rows = [list(row) for row in queue.rows]
    _, kept = serve(queue, limits)
    for tokens, limit in zip(queue.groups(), limits, strict=True):
        line = queue.line(tokens)
        came = [0] * queue.num_experts
        for t, rank in line:
            came[queue.rows[t][rank]] += 1
        waiting = {(t, rank) for t, rank in line if not kept[t][rank] and not queue.withdrawn[t][rank]}
        tried = {
            t: {e for e, gone in zip(queue.rows[t], queue.withdrawn[t], strict=True) if e >= 0 and not gone}
            for t in tokens
        }
        while True:
            target = {}
            for t, rank in sorted(waiting):
                best = -1
                for e in range(queue.num_experts):
                    if e not in tried[t] and (best < 0 or scores[t][e] > scores[t][best]):
                        best = e
                if best >= 0:
                    target[t, rank] = best
                    tried[t].add(best)
            if not target:
                break
            for t, rank in line:
                if (t, rank) in target:
                    e = target[t, rank]
                    if came[e] < limit:
                        rows[t][rank], kept[t][rank] = e, True
                        waiting.remove((t, rank))
                    came[e] += 1
    return rows, kept
