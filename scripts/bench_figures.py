"""Blocks of the pages for what `gatewright bench` measured: layers, routers, training steps, decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gatewright.measuring.profile import profile_text


def bench_block(record: Mapping[str, Any], source: str) -> str:
    """Return a speed grid: geometric means, goals, a line per row, what was left out, and where it was."""
    lines = [
        "| geometric mean | rows | ours / best dense | ours / transformers' best "
        "| transformers' best / best dense | ours / roofline |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for entry in record["geometric_means"]:
        names = ("dense", "transformers", "transformers_over_dense", "roofline")
        means = " | ".join("-" if entry[name] is None else f"{entry[name]:.2f}" for name in names)
        rows = f"{entry['rows']}" + (f" ({entry['refused']} refused)" if entry["refused"] else "")
        lines.append(f"| {entry['dtype']}, {entry['pass']} | {rows} | {means} |")
    words = {True: "held", False: "not held", None: "open"}
    lines += ["", *(f"- {words[g['held']]}: {_goal(g)}" for g in record["goals"]), ""]
    lines += [
        "| T x D x F x E x K | dtype, pass | ours | / best dense | / transformers' best | / roofline "
        "| / fewest experts |",
        "|---|---|--:|--:|--:|--:|--:|",
        *map(_bench_row, record["rows"]),
        "",
    ]
    reasons: dict[str, list[str]] = {}
    for row in record["rows"]:
        for side, reason in row["left_out"].items():
            reasons.setdefault(f"{side}: {reason}", []).append(f"{row['name']} {row['dtype']}")
    lines += [f"- left out: {told} ({', '.join(dict.fromkeys(where))})" for told, where in reasons.items()]
    for row in record["rows"]:
        if row["memory"]:
            shown = [
                f"{side} {'died' if taken is None else f'{taken / 2**20:.0f} MiB'}"
                for side, taken in row["memory"].items()
            ]
            lines.append(f"- peak memory {row['name']} {row['dtype']}: {', '.join(shown)}")
        if row.get("profile"):
            told = profile_text(row["profile"])
            lines.append(f"- profile {row['name']} {row['dtype']} {row['pass']}: {told}")
    place, how = record["environment"], record["settings"]
    lines += [
        "",
        f"Measured with `{record['command']}` on {place['processor']} ({_rates(record)}), "
        f"{place['threads']} threads, torch {place['torch']}, "
        f"transformers {how['transformers'] or 'not installed'}, backend {how['backend']}, "
        f"allocator {how['allocator']}, gradients {how['gradients']} between calls, {how['rounds']} rounds, "
        f"commit `{place['commit']}`; every number is taken from `reproductions/{source}`.",
    ]
    return "\n".join(lines) + "\n"


def routers_block(record: Mapping[str, Any], source: str) -> str:
    """Return every router's time over plain token choice, the dearest first, and where it was measured."""
    rows = sorted(record["rows"], key=lambda row: -row["ratio"])
    shown = [f"`{row['router']}` {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in rows]
    what = "the whole layer" if record["settings"]["whole_layer"] else "the router alone"
    place = record["environment"]
    return (
        f"Over plain token choice, {what}: {', '.join(shown)}.\n\n"
        f"Measured with `{record['command']}` on {place['processor']}, {place['threads']} threads, torch "
        f"{place['torch']}, commit `{place['commit']}`; "
        f"every number is taken from `reproductions/{source}`.\n"
    )


def step_block(record: Mapping[str, Any], source: str) -> str:
    """Return whole steps, goals and parts of a training step, and where it was measured."""
    from gatewright.measuring.step_result import size_lines  # which loads torch: only where there is a step

    words = {True: "held", False: "not held", None: "open"}
    lines = []
    for row in record["rows"]:
        steps = [
            f"{name.replace('_', ' ')} {1e3 * own['median']:.1f} ms"
            for name, own in row["step_seconds"].items()
        ]
        lines += [
            f"{row['precision']}: {', '.join(steps)}.",
            "",
            "| part | sparse | / floor | dense | / floor |",
        ]
        lines += ["|---|--:|--:|--:|--:|"]
        sides = [row["sides"][name]["parts"] for name in ("sparse", "dense")]
        for part in dict.fromkeys(part for own in sides for part in own):
            lines.append(
                f"| {part.replace('_', ' ')} | {' | '.join(_part(own.get(part)) for own in sides)} |"
            )
        lines.append("")
        lines += [f"- {told.strip()}" for told in size_lines(row)]
    lines += [f"- {words[g['held']]}: {g['precision']}: {g['goal']}: {g['shown']}" for g in record["goals"]]
    place, how = record["environment"], record["settings"]
    lines += [
        "",
        f"Measured with `{record['command']}` on {place['processor']} ({_rates(record)}), "
        f"{place['threads']} threads, torch {place['torch']}, allocator {how['allocator']}, {how['rounds']} "
        f"rounds, commit `{place['commit']}`; every number is taken from `reproductions/{source}`.",
    ]
    return "\n".join(lines) + "\n"


def decode_block(record: Mapping[str, Any], source: str) -> str:
    """Return a row for each dtype and pass of a decoding race, and where it was measured."""
    lines = [
        "| dtype, pass | ours, tokens/s | int8 experts | transformers' best "
        "| ours / transformers' best (time) | share of the bandwidth |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        head = f"| {row['dtype']}, {row['pass']} |"
        if row["refused"]:
            lines.append(f"{head} refused: {row['refused']} | | | | |")
            continue
        speeds = {name: speed["median"] for name, speed in row["tokens_per_second"].items()}
        theirs = [speed for name, speed in speeds.items() if name.startswith("transformers")]
        best = f"{max(theirs):.1f}" if theirs else "-"
        share = row["bandwidth_share"].get("ours")
        lines.append(
            f"{head} {speeds['ours']:.1f} | {speeds['ours_int8']:.1f} | {best} "
            f"| {_range(row['ratios']['transformers'])} | {_range(share)} |"
        )
    reasons: dict[str, list[str]] = {}
    for row in record["rows"]:
        for side, reason in row["left_out"].items():
            reasons.setdefault(f"{side}: {reason}", []).append(f"{row['dtype']} {row['pass']}")
    lines += ["", *(f"- left out: {told} ({', '.join(where)})" for told, where in reasons.items())]
    for row in record["rows"]:
        parted = {name: seen for name, seen in row["agreement"].items() if seen["rows_equal"] < seen["rows"]}
        for name, seen in parted.items():
            lines.append(
                f"- {row['dtype']} {row['pass']}: the ids of {name} part from ours in "
                f"{seen['rows'] - seen['rows_equal']} of {seen['rows']} texts, at a lead of at most "
                f"{seen['widest_lead_where_parted']:.4f} of the largest logit"
            )
    place, how = record["environment"], record["settings"]
    sizes = ", ".join(f"{name} {value}" for name, value in how["sizes"].items())
    return "\n".join(lines) + (
        f"\n\nMeasured with `{record['command']}` ({sizes}) on {place['processor']}, "
        f"{place['threads']} threads, torch {place['torch']}, transformers {how['transformers']}, "
        f"allocator {how['allocator']}, {how['rounds']} rounds, commit `{place['commit']}`; "
        f"every number is taken from `reproductions/{source}`.\n"
    )


def _rates(record: Mapping[str, Any]) -> str:
    """Return what the machine was measured to do at most."""
    return ", ".join(f"{name} {rate['median'] / 1e9:.1f} G/s" for name, rate in record["machine"].items())


def _part(own: Mapping[str, Any] | None) -> str:
    """Return a part's milliseconds and its time over its floor, as two cells."""
    if own is None:
        return "- | -"
    taken = own["forward"] + own["backward"]
    return f"{1e3 * taken:.2f} ms | " + (f"{taken / own['floor']:.1f}" if own["floor"] else "-")


def _goal(goal: Mapping[str, Any]) -> str:
    return f"{goal['dtype']}, {goal['pass']}: {goal['goal']}: {goal['shown']}"


def _bench_row(row: Mapping[str, Any]) -> str:
    """Return one row of a speed grid; the reason stands in place of a refused row's ratios."""
    head = f"| {row['name']} | {row['dtype']}, {row['pass']} |"
    if row["refused"]:
        return f"{head} refused: {row['refused']} | | | | |"
    ratios = row["ratios"]
    shown = [_range(ratios[name]) for name in ("dense", "transformers")]
    few = f"{_range(ratios['fewest_experts'])} of {row['fewest_experts']}" if row["fewest_experts"] else "-"
    ours = 1e3 * row["roofline_seconds"] * ratios["roofline"]["median"]
    return f"{head} {ours:.2f} ms | {shown[0]} | {shown[1]} | {ratios['roofline']['median']:.2f} | {few} |"


def _range(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def against_block(record: Mapping[str, Any], source: str) -> str:
    """Return how much faster both models' steps are than at an earlier commit, and where it was measured."""
    told = [
        f"a {name} step takes {own['here_ms']:.1f} ms and took {own['there_ms']:.1f} ms, {own['ratio']:.2f} "
        f"({own['low']:.2f} to {own['high']:.2f}) times as long"
        for name, own in record["models"].items()
    ]
    place, how = record["environment"], record["settings"]
    return (
        f"Against commit `{record['there']}`: {'; '.join(told)}.\n\n"
        f"Measured with `{record['command']}` on {place['processor']}, {place['threads']} threads, torch "
        f"{place['torch']}, {how['rounds']} rounds, commit `{place['commit']}`; every number is taken from "
        f"`reproductions/{source}`.\n"
    )


BLOCKS: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "layer": bench_block,
    "routers": routers_block,
    "step": step_block,
    "decode": decode_block,
    "against": against_block,
}
