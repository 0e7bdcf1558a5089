"""The frozen record that leaves every MoE layer beside its output: sums only, reduced inside the layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True)
class RouterStats:
    """Sufficient statistics of one router on one batch of T tokens (padding enters none of them).

    Counts are int64 and carry no gradient; the sums are fp32 (fp64 for fp64 input) and do, so that losses can
    be built from them. `tokens`: T as a 0-d tensor. `counts` [E]: assignments made per expert, before
    capacity. `kept` [E]: after capacity. `dropped_by_rank` [K]: assignments dropped at capacity, by the
    token's rank of that choice. `unrouted`: tokens left without any expert. `score_sums` [E]: sum over tokens
    of the scores, normalised over experts (a softmax is its own normal form). `logsumexp_sum`,
    `logsumexp_square_sum`: over tokens, of logsumexp(logits). `nonfinite`: tokens whose logits hold a NaN or
    an infinity. `first_counts` [E]: as counts, of first choices only. `group_tokens` [G], `group_counts`,
    `group_first_counts`, `group_score_sums` [G, E]: tokens, counts, counts of first choices and score sums of
    each routing group where the layer has a group_size, else of each sequence of a batch [B, S, D]. `sums`:
    what the rule or its noise has to say to a loss, by name, summed over tokens ("importance" [E], "load"
    [E], ...). With capture: `logits` [T, E], `scores` [T, E], `experts` [T, K] (-1 where padding or dropped),
    `combine_weights` [T, K].
    """

    num_selected: int
    tokens: Int64[Tensor, ""]
    counts: Int64[Tensor, "E"]
    kept: Int64[Tensor, "E"]
    dropped_by_rank: Int64[Tensor, "K"]
    unrouted: Int64[Tensor, ""]
    score_sums: Float[Tensor, "E"]
    logsumexp_sum: Float[Tensor, ""]
    logsumexp_square_sum: Float[Tensor, ""]
    nonfinite: Int64[Tensor, ""]
    first_counts: Int64[Tensor, "E"]
    group_tokens: Int64[Tensor, "G"]
    group_counts: Int64[Tensor, "G E"]
    group_first_counts: Int64[Tensor, "G E"]
    group_score_sums: Float[Tensor, "G E"]
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    logits: Float[Tensor, "T E"] | None = None
    scores: Float[Tensor, "T E"] | None = None
    experts: Int64[Tensor, "T K"] | None = None
    combine_weights: Float[Tensor, "T K"] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[0]


class Stats(Mapping[str, RouterStats]):
    """A flat, read-only mapping from router name ("layers.3.router") to its RouterStats."""

    def __init__(self, routers: Mapping[str, RouterStats] | None = None) -> None:
        self._routers = dict(routers or {})

    def __getitem__(self, name: str) -> RouterStats:
        return self._routers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._routers)

    def __len__(self) -> int:
        return len(self._routers)

    def __repr__(self) -> str:
        return f"Stats({', '.join(self._routers)})"

    def under(self, prefix: str) -> Stats:
        """Return the same records with every name put below `prefix`."""
        return Stats({f"{prefix}.{name}": record for name, record in self._routers.items()})

    def __or__(self, other: Stats) -> Stats:
        """Return both records' routers; a name that both hold is an error, since one would be lost."""
        twice = set(self) & set(other)
        if twice:
            raise ValueError(
                f"router names {sorted(twice)} stand in both Stats; name each layer apart with .under()"
            )
        return Stats({**self._routers, **other._routers})


# torch.export wants to take apart what a model returns, and to put it together again.
_FIELDS = [one.name for one in fields(RouterStats) if one.name != "num_selected"]


def _record_parts(record: RouterStats) -> tuple[list[object], int]:
    return [getattr(record, name) for name in _FIELDS], record.num_selected


def _record_of(parts: Iterable[Any], num_selected: int) -> RouterStats:
    return RouterStats(num_selected, **dict(zip(_FIELDS, parts, strict=True)))


def _stats_parts(stats: Stats) -> tuple[list[object], list[str]]:
    return list(stats.values()), list(stats)


def _stats_of(parts: Iterable[Any], names: list[str]) -> Stats:
    return Stats(dict(zip(names, parts, strict=True)))


_pytree.register_pytree_node(
    RouterStats, _record_parts, _record_of, serialized_type_name="gatewright.RouterStats"
)
_pytree.register_pytree_node(Stats, _stats_parts, _stats_of, serialized_type_name="gatewright.Stats")
