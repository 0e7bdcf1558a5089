"""The headline: who won, by how much, and whether that is more than the seeds differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .markup import Html, cell, html_table, mark, paragraph, with_note
from .record import Record, lookup, mean, number, rows, spread, text
from .words import NONE, bits, escape, percent, plural, scaled, seconds, signed, times


@dataclass(frozen=True)
class Verdict:
    """The numbers of the headline; None where the record lacks them."""

    held: bool | None
    sparse: str
    dense: str
    seeds: int
    gap: float | None
    gap_spread: float | None
    share: float | None
    sparse_final: float | None
    dense_final: float | None

    @classmethod
    def of(cls, record: Record) -> Verdict:
        """Read the recorded verdict; what it leaves out comes from the comparisons of single seeds."""
        pairs = record.headline
        sparse = text(pairs[0], "sparse") if pairs else ""
        dense = text(pairs[0], "dense") if pairs else ""
        gaps = [number(item, "gap_bpb") for item in pairs]
        gap = number(record.result, "verdict", "gap_mean")
        width = number(record.result, "verdict", "gap_spread")
        held = lookup(record.result, "verdict", "held")
        flags = [lookup(item, "held") for item in pairs]
        if not isinstance(held, bool):
            held = all(flags) if flags and all(isinstance(flag, bool) for flag in flags) else None
        return cls(
            held=held,
            sparse=sparse,
            dense=dense,
            seeds=len(pairs),
            gap=gap if gap is not None else mean(gaps),
            gap_spread=width if width is not None and len(pairs) > 1 else spread(gaps),
            share=mean([number(item, "token_share") for item in pairs]),
            sparse_final=mean(record.values(sparse, "final", "valid_bpb")),
            dense_final=mean(record.values(dense, "final", "valid_bpb")),
        )

    @property
    def contradiction(self) -> str:
        """Return what is wrong when the recorded flag and the recorded gap disagree, else an empty text."""
        if self.gap is None or self.held is None:
            return ""
        if self.held and self.gap < 0:
            return "The record says held, yet its mean gap is negative: trust the gap."
        if not self.held and self.gap > 0 and (self.gap_spread is None or self.gap > self.gap_spread):
            return (
                "The record says not held, yet its mean gap is positive and above the spread: see the seeds."
            )
        return ""

    def sentence(self) -> str:
        """Return the outcome in plain words, with the numbers."""
        if self.gap is None:
            return "The gap between the sparse and the dense side is not recorded."
        share = percent(self.share) if self.share is not None else "an unrecorded share"
        ours = f"The sparse model, annealed on {share} of the tokens, ended at {bits(self.sparse_final)}"
        theirs = f"its dense twin, annealed on 100 %, at {bits(self.dense_final)} bits per byte"
        if self.gap > 0:
            outcome = f"Sparse is better by {bits(self.gap)}"
        elif self.gap < 0:
            outcome = f"Sparse is worse by {bits(-self.gap)}"
        else:
            outcome = "They are equal"
        if self.gap_spread is None:
            return f"{ours}; {theirs}. {outcome}. One seed: the spread over seeds is not recorded."
        if self.gap > self.gap_spread:
            size = "more than the spread of"
        elif self.gap > 0:
            size = "which is no more than the spread of"
        else:
            size = "with a spread of"
        seeds = plural(self.seeds, "seed")
        return f"{ours}; {theirs}. {outcome} on average, {size} {bits(self.gap_spread)} over {seeds}."


def tile(value: str, label: str, note: str = "") -> str:
    """Return one figure of the headline."""
    extra = f"<small>{escape(note)}</small>" if note else ""
    return f"<li><strong>{escape(value)}</strong><span>{escape(label)}</span>{extra}</li>"


def speedups(record: Record, key: str) -> tuple[float | None, str]:
    """Return the mean speed-up over the seeds that reached the dense quality, and a note on the others."""
    ratios = [number(item, "speedup", key) for item in record.headline]
    missed = sum(value is None for value in ratios)
    note = f"not reached in {missed} of {plural(len(ratios), 'seed')}" if missed else ""
    return mean(ratios), note


def _tiles(record: Record, verdict: Verdict) -> str:
    pairs = record.headline
    several = f"mean of {plural(len(pairs), 'seed')}" if len(pairs) > 1 else ""
    tiles = [
        tile(percent(verdict.share), "of the dense twin's tokens"),
        tile(signed(verdict.gap), "bits per byte, dense − sparse", "positive: sparse better"),
    ]
    if verdict.gap_spread is not None:
        tiles.append(tile(bits(verdict.gap_spread), "spread over seeds", "largest − smallest gap"))
    for key, label in (("tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "the clock")):
        ratio, note = speedups(record, key)
        word = note or ("slower than dense" if ratio is not None and ratio < 1 else several)
        tiles.append(tile(times(ratio, "never"), f"speed-up by {label}", word))
    ratio = mean([number(item, "step_time_ratio", "median") for item in pairs])
    tiles.append(tile(times(ratio, NONE), "time of a sparse step", "dense step = 1"))
    return f'<ul class="tiles">{"".join(tiles)}</ul>'


def _pair(item: Any) -> tuple[str, str, str]:
    return text(item, "sparse"), text(item, "dense"), text(item, "against")


def _step_time(item: Any) -> Html:
    low, high = number(item, "step_time_ratio", "low"), number(item, "step_time_ratio", "high")
    interval = f"{times(low)} – {times(high)}" if low is not None and high is not None else ""
    return with_note(times(number(item, "step_time_ratio", "median"), NONE), interval)


def _seeds_table(record: Record, items: list[Any]) -> str:
    """Return one comparison, a column per seed."""
    sparse, dense, against = _pair(items[0])
    finals = [
        {
            run.name: number(run.side, "final", "valid_bpb")
            for run in record.runs
            if run.seed == text(item, "seed")
        }
        for item in items
    ]
    lines: list[list[object]] = [
        ["Verdict", *(mark(lookup(item, "held")) for item in items)],
        ["Sparse, final bits per byte", *(bits(known.get(sparse)) for known in finals)],
        ["Dense, final bits per byte", *(bits(known.get(dense)) for known in finals)],
        ["Gap, dense − sparse", *(signed(number(item, "gap_bpb")) for item in items)],
    ]
    for word, key in (
        ("tokens", "token_share"),
        ("training FLOPs", "flop_share"),
        ("seconds", "second_share"),
    ):
        lines.append([f"Share of dense {word}", *(percent(number(item, key)) for item in items)])
    for word, key in (("tokens", "tokens"), ("training FLOPs", "flops"), ("seconds", "seconds")):
        lines.append([f"Speed-up by {word}", *(times(number(item, "speedup", key)) for item in items)])
    lines.append(["Step time, sparse / dense", *(_step_time(item) for item in items)])
    equal = {"active": "equal FLOPs per token", "total": "equal total parameters"}.get(against, against)
    caption = f"{record.label(sparse)} against {record.label(dense)}"
    caption += f", {equal}" if equal and equal not in caption else ""
    return html_table(["", *(f"seed {text(item, 'seed')}" for item in items)], lines, caption=caption)


def comparisons(record: Record) -> str:
    """Return every comparison: the one of the verdict in view, the others folded away below it."""
    pairs = list(dict.fromkeys(_pair(item) for item in record.headline + record.comparisons))
    tables = [_seeds_table(record, [x for x in record.comparisons if _pair(x) == pair]) for pair in pairs]
    if len(tables) < 2:
        return "".join(tables)
    rest = f"<details><summary>Other comparisons ({len(tables) - 1})</summary>{''.join(tables[1:])}</details>"
    return tables[0] + rest


def unfinished(record: Record) -> str:
    """Return which sides ended before their token budget, or an empty text."""
    short = []
    for run in record.runs:
        done, budget = number(run.side, "final", "tokens"), number(run.side, "token_budget")
        if done is not None and budget is not None and done < 0.99 * budget:
            short.append(f"{run.name}, seed {run.seed}: {scaled(done)} of {scaled(budget)} tokens")
    return f"Stopped before the end, so this is no verdict yet: {'; '.join(short)}." if short else ""


def race_headline(record: Record) -> str:
    """Return the verdict card and its tiles."""
    verdict = Verdict.of(record)
    style = "held" if verdict.held else "lost" if verdict.held is False else "open"
    recorded = text(record.result, "verdict", "sentence")
    own = verdict.sentence()
    lead = paragraph(escape(recorded or own), "lead")
    more = paragraph(escape(own)) if recorded and recorded != own else ""
    warn = "".join(
        paragraph(escape(words), "warning") for words in (verdict.contradiction, unfinished(record)) if words
    )
    card = f'<div class="verdict {style}"><h2>{mark(verdict.held)}</h2>{lead}{more}{warn}</div>'
    return f'<section id="verdict">{card}{_tiles(record, verdict)}</section>'


def train_headline(record: Record) -> str:
    """Return the outcome of a training run, which has nothing to win against."""
    names = record.names
    if not names:
        return '<section id="verdict"><div class="verdict open"><h2>No side is recorded</h2></div></section>'
    name = names[0]
    side = record.first(name)
    final = record.values(name, "final", "valid_bpb")
    seeds = f" (mean of {plural(len(final), 'seed')}, spread {bits(spread(final))})" if len(final) > 1 else ""
    words = (
        f"{record.label(name)} ended at {bits(mean(final))} bits per byte{seeds} after "
        f"{scaled(number(side, 'final', 'tokens'))} tokens and {seconds(number(side, 'final', 'seconds'))}."
    )
    tiles = [
        tile(bits(mean(final)), "final bits per byte"),
        tile(scaled(number(side, "total_parameters")), "total parameters"),
        tile(scaled(number(side, "active_parameters")), "active parameters"),
        tile(scaled(number(side, "tokens_per_second")), "tokens per second"),
    ]
    stopped = rows(side, "curve")
    note = "" if stopped else paragraph("No evaluation is recorded.", "warning")
    if short := unfinished(record).replace("this is no verdict yet", "this is no final result"):
        note += paragraph(escape(short), "warning")
    card = f'<div class="verdict open"><h2>Result</h2><p class="lead">{cell(words)}</p>{note}</div>'
    return f'<section id="verdict">{card}<ul class="tiles">{"".join(tiles)}</ul></section>'
