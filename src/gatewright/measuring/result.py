"""A finished measurement: as plain data, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gatewright.errors import RunFailure
from gatewright.measuring.profile import profile_text
from gatewright.measuring.record import Row
from gatewright.measuring.summary import counted

SCHEMA = "gatewright.bench.layer.v2"
NAMED = 3  # refused rows that the line of an error spells out
COLUMNS = (
    f"{'tokens':>7}{'D':>5}{'F':>6}{'E':>5}{'K':>3}  {'dtype':6}{'pass':18}{'ours':>9}"
    f"{'/ best dense':>22}{'/ transformers best':>22}{'/ roofline':>12}{'/ fewest experts':>26}"
)


@dataclass(frozen=True)
class BenchResult:
    """What `bench_layer` measured; `record` is what layer.json holds."""

    record: Mapping[str, Any]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**self.record, "files": list(self.files)}

    def check(self) -> None:
        """Raise RunFailure if the machine was too busy for some rows."""
        rows = self.record["rows"]
        refused = [row for row in rows if row["refused"]]
        if refused:
            names = [f"{row['name']} {row['dtype']} {row['pass']}" for row in refused]
            told = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            raise RunFailure(
                f"{len(refused)} of {len(rows)} rows refused, the dense side alone spread too much: {told}; "
                "run again with --resume on a quiet machine; the other rows are kept"
            )

    def to_text(self) -> str:
        """Return the machine, the table, what was left out, the means and the goals."""
        record = self.record
        lines = [*_place(record), "", COLUMNS, *map(table_row, record["rows"]), ""]
        lines += [*_left_out(record["rows"]), *_memory_and_profile(record["rows"])]
        lines += ["geometric means", *map(mean_line, record["geometric_means"]), "", "goals"]
        lines += map(goal_line, record["goals"])
        return "\n".join([*lines, "", *self.files])


def _place(record: Mapping[str, Any]) -> list[str]:
    where, settings = record["environment"], record["settings"]
    rates = []
    for name, rate in record["machine"].items():
        unit = "GB/s" if name == "copy_bytes" else "GFLOP/s"
        low, high = (rate[end] / 1e9 for end in ("low", "high"))
        rates.append(f"{name.rpartition('_')[0]} {rate['median'] / 1e9:.1f} {unit} ({low:.1f} to {high:.1f})")
    return [
        f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, transformers "
        f"{settings['transformers'] or 'not installed'}, commit {where['commit']}",
        f"backend {settings['backend']}, allocator {settings['allocator']}, gradients "
        f"{settings['gradients']} between calls, {settings['rounds']} rounds",
        f"measured: {'; '.join(rates)}",
    ]


def ratio_text(ratio: Mapping[str, float] | None) -> str:
    """Return "1.23 (1.20 to 1.31)", or "-" for a ratio that is not there."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "-"


def table_row(row: Row) -> str:
    """Return one row of the table; of a refused one the reason stands in place of its ratios."""
    tokens, width, expert_width, experts, selected = row["shape"].values()
    head = (
        f"{tokens:7d}{width:5d}{expert_width:6d}{experts:5d}{selected:3d}  {row['dtype']:6}{row['pass']:18}"
    )
    if row["refused"]:
        return f"{head} refused: {row['refused']}"
    ratios = row["ratios"]
    ours = 1e3 * row["roofline_seconds"] * ratios["roofline"]["median"]
    few = (
        f"{ratio_text(ratios['fewest_experts'])} of {row['fewest_experts']}" if row["fewest_experts"] else "-"
    )
    return (
        f"{head}{ours:6.1f} ms{ratio_text(ratios['dense']):>22}{ratio_text(ratios['transformers']):>22}"
        f"{ratios['roofline']['median']:12.2f}{few:>26}"
    )


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Return each side that a row does without, and why; rows with the same reason on one line."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for side, reason in row["left_out"].items():
            reasons.setdefault(f"left out: {side}: {reason}", []).append(f"{row['name']} {row['dtype']}")
    lines = []
    for told, where in reasons.items():
        names = list(dict.fromkeys(where))
        lines.append(f"{told} ({names[0] if len(names) == 1 else f'{len(names)} rows'})")
    return [*lines, ""] if lines else []


def _memory_and_profile(rows: Sequence[Row]) -> list[str]:
    measured = [row for row in rows if row["memory"]]
    lines = [f"peak memory {row['name']} {row['dtype']}: {memory_text(row['memory'])}" for row in measured]
    lines += [
        f"profile {row['name']} {row['dtype']} {row['pass']}: {profile_text(row['profile'])}"
        for row in rows
        if row.get("profile")
    ]
    return [*lines, ""] if lines else []


def memory_text(memory: Mapping[str, int | None]) -> str:
    """Return each side's peak memory in words."""
    told = {
        side: "died" if taken is None else f"{taken / (1 << 20):.0f} MiB" for side, taken in memory.items()
    }
    return ", ".join(f"{side} {words}" for side, words in told.items())


def mean_line(entry: Row) -> str:
    """Return one dtype's and pass's geometric means as a line."""
    words = {
        "dense": "ours / best dense",
        "transformers": "ours / transformers best",
        "transformers_over_dense": "transformers best / best dense",
        "roofline": "ours / roofline",
    }
    shown = [f"{told} {entry[name]:.2f}" for name, told in words.items() if entry[name] is not None]
    return f"  {entry['dtype']} {entry['pass']} ({counted(entry)}): {', '.join(shown) or 'nothing measured'}"


def goal_line(goal: Row) -> str:
    """Return one goal as a line."""
    word = {True: "held", False: "not held", None: "open"}[goal["held"]]
    return f"  {word:9}{goal['dtype']} {goal['pass']}: {goal['goal']}: {goal['shown']}"
