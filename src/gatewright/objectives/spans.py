"""Span corruption: runs of a text are masked, and the model writes what stood there (Raffel et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gatewright.errors import UserError
from gatewright.objectives.next_token import NextToken
from gatewright.parts.draws import fold, uniform_rows


class Pair(NamedTuple):
    """What a model reads and writes: `source` [B, P], `target` [B, S] with the start id in front and without
    its last id, and `labels` [B, S], the id that follows each of the target's.
    """

    source: Int64[Tensor, "B P"]
    target: Int64[Tensor, "B S"]
    labels: Int64[Tensor, "B S"]


@dataclass(frozen=True)
class Spans:
    """How texts of `length` tokens are masked, always the same number of tokens in the same number of runs.

    `density` of the tokens, in runs of `mean_length` on average (T5: 15 %, 3), both rounded to whole
    numbers. In the source, run i is replaced by the sentinel `first_sentinel` + i; the target names each
    sentinel with the tokens that it stands for; both end with the id `end`, which also starts the target.
    """

    length: int
    first_sentinel: int
    end: int
    density: float = 0.15
    mean_length: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or not self.mean_length >= 1:
            raise UserError(
                f"span density {self.density}, mean length {self.mean_length}; allowed: above 0 and below 1, "
                "and 1 or more"
            )
        if self.length < 2:
            raise UserError(f"{self.length} tokens to mask spans of; allowed: 2 or more")

    @property
    def num_masked(self) -> int:
        """Tokens of a text that are masked, at least one and never all."""
        return min(max(round(self.length * self.density), 1), self.length - 1)

    @property
    def num_spans(self) -> int:
        """Runs that they stand in: one sentinel each. Between two runs stands at least one token."""
        most = min(self.num_masked, self.length - self.num_masked)
        return min(max(round(self.num_masked / self.mean_length), 1), most)

    @property
    def source_length(self) -> int:
        """P: what is left, a sentinel for each run, and the end."""
        return self.length - self.num_masked + self.num_spans + 1

    @property
    def target_length(self) -> int:
        """S: what is masked, the same sentinels, and the end."""
        return self.num_masked + self.num_spans + 1

    def mask(self, key: Int64[Tensor, ""], rows: int) -> Bool[Tensor, "B L"]:
        """Return which tokens of `rows` texts are masked, a pure function of the key; row r depends on (key,
        r) alone. Runs and what lies between them have random lengths; a text begins unmasked, ends masked.
        """
        masked = _parts(fold(key, 0), rows, self.num_masked, self.num_spans)
        kept = _parts(fold(key, 1), rows, self.length - self.num_masked, self.num_spans)
        lengths = torch.stack([kept, masked], dim=-1).flatten(1)
        ends = lengths.cumsum(-1)
        places = torch.arange(self.length, device=key.device).expand(rows, -1).contiguous()
        return torch.searchsorted(ends, places, right=True) % 2 == 1

    def corrupt(self, tokens: Int64[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Pair:
        """Return the pair of each text, for a mask as `mask` makes it."""
        rows = tokens.shape[0]
        before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
        starts = mask & ~before
        number = starts.cumsum(-1) - 1
        end = tokens.new_full((rows, 1), self.end)
        sentinels = number + self.first_sentinel
        source = torch.where(starts, sentinels, tokens)[~mask | starts].view(rows, -1)
        labels = tokens.new_empty(rows, self.num_masked + self.num_spans)
        # Masked token j of run i stands behind j tokens and i + 1 sentinels.
        places = torch.arange(self.num_masked, device=tokens.device) + number[mask].view(rows, -1) + 1
        labels.scatter_(1, places, tokens[mask].view(rows, -1))
        firsts = starts[mask].view(rows, -1)
        labels.scatter_(1, places[firsts].view(rows, -1) - 1, sentinels[starts].view(rows, -1))
        labels = torch.cat([labels, end], dim=1)
        return Pair(torch.cat([source, end], dim=1), torch.cat([end, labels[:, :-1]], dim=1), labels)

    def restore(self, source: Int64[Tensor, "P"], labels: Int64[Tensor, "S"]) -> Int64[Tensor, "L"]:
        """Return the text that one source and its labels were made of."""
        runs: dict[int, list[int]] = {}
        for i in labels[:-1].tolist():
            if i >= self.first_sentinel:
                last = runs.setdefault(i, [])
            else:
                last.append(i)
        text: list[int] = []
        for i in source[:-1].tolist():
            text += runs[i] if i >= self.first_sentinel else [i]
        return torch.tensor(text, dtype=torch.int64, device=source.device)


def _parts(key: Tensor, rows: int, total: int, count: int) -> Tensor:
    """Return `count` whole numbers of at least 1 with the sum `total`, [rows, count]; any is as likely."""
    draws = uniform_rows(key, torch.arange(rows, device=key.device), max(total - 1, 1))
    cuts = torch.argsort(draws, dim=-1, stable=True)[:, : count - 1].sort(dim=-1).values + 1
    edges = torch.cat([cuts.new_zeros(rows, 1), cuts, cuts.new_full((rows, 1), total)], dim=1)
    return edges.diff(dim=-1)


@dataclass(frozen=True)
class SpanCorruption(NextToken):
    """`NextToken` on the labels of masked spans: task is in nats per label, of sentinels and ends too."""

    spans: Spans = field(default_factory=lambda: Spans(256, 257, 270))

    def pair(self, tokens: Int64[Tensor, "B L"], key: Int64[Tensor, ""]) -> Pair:
        """Return the pair of each text [B, L], masked by the key."""
        return self.spans.corrupt(tokens, self.spans.mask(key, tokens.shape[0]))
