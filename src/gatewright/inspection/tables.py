"""Tables of the report: the sides, the domains, the settings, the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markup import Html, html_table, missing
from .plots.bars import domain_gaps
from .record import Record, lookup, mean, number, rows, spread, table, text
from .words import NONE, bits, escape, flops, percent, plural, rate, scaled, seconds, signed


def final_with_range(record: Record, name: str, *path: str) -> str:
    """Return a side's mean final loss, with the range when there are several seeds."""
    values = record.values(name, *path)
    known = [value for value in values if value is not None]
    words = bits(mean(values))
    return f"{words} ({bits(min(known))} – {bits(max(known))})" if spread(values) is not None else words


def sides_table(record: Record) -> str:
    """Return sizes, cost and outcome of each side; means over seeds where there are several."""
    lines = []
    for name in record.names:
        side = record.first(name)
        lines.append(
            [
                record.label(name),
                "sparse" if record.is_sparse(name) else "dense",
                scaled(number(side, "total_parameters")),
                scaled(number(side, "active_parameters")),
                flops(number(side, "forward_flops_per_token")),
                flops(number(side, "train_flops_per_token")),
                rate(number(side, "learning_rate")),
                scaled(mean(record.values(name, "final", "tokens")) or number(side, "token_budget")),
                flops(mean(record.values(name, "final", "train_flops"))),
                seconds(mean(record.values(name, "train_seconds")) or mean(record.values(name, "final", "seconds"))),
                scaled(mean(record.values(name, "tokens_per_second"))),
                final_with_range(record, name, "final", "valid_bpb"),
            ]
        )
    headers = ["Side", "Kind", "Total parameters", "Active parameters", "FLOPs per token, forward", "training"]
    headers += ["Learning rate", "Tokens", "Training FLOPs", "Seconds", "Tokens/s", "Final bits per byte"]
    seeds = plural(len(record.seeds), "seed")
    caption = f"The sides, {seeds}" + (": means over seeds, range in brackets" if len(record.seeds) > 1 else "")
    return html_table(headers, lines, caption=caption) if lines else missing("Sides")


def domains_table(record: Record) -> str:
    """Return final bits per byte by domain and side, and the gap where two sides were compared."""
    names = [name for name in record.names if any(record.values(name, "final", "domains", d) for d in record.domains)]
    if not names:
        return ""
    gaps = domain_gaps(record)
    lines = []
    for domain in record.domains:
        line: list[object] = [domain]
        line += [final_with_range(record, name, "final", "domains", domain) for name in names]
        if gaps:
            values = gaps.get(domain, [])
            gap = mean(values)
            width = spread(values)
            line.append(signed(gap) + (f" (spread {bits(width)})" if width is not None else ""))
            line.append(NONE if gap is None else "sparse" if gap > 0 else "dense" if gap < 0 else "equal")
        lines.append(line)
    whole: list[object] = [Html("<b>all, by bytes</b>")]
    whole += [Html(f"<b>{escape(final_with_range(record, name, 'final', 'valid_bpb'))}</b>") for name in names]
    if gaps:
        gap = mean([number(item, "gap_bpb") for item in record.headline])
        whole += [Html(f"<b>{escape(signed(gap))}</b>"), NONE if gap is None else "sparse" if gap > 0 else "dense"]
    headers = ["Domain", *(record.label(name) for name in names)]
    headers += ["Gap, dense − sparse", "Better"] if gaps else []
    return html_table(headers, [*lines, whole], caption="Final bits per byte by domain (lower is better)")


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted names with their values as text."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def settings_table(record: Record) -> str:
    """Return every setting of every side, one column per side."""
    columns = {name: flattened(table(record.first(name), "settings")) for name in record.names}
    keys = list(dict.fromkeys(key for settings in columns.values() for key in settings))
    if not keys:
        return missing("Settings")
    lines = [[Html(f"<code>{escape(key)}</code>"), *(columns[name].get(key, "–") for name in columns)] for key in keys]
    papers = ["paper", *(text(record.first(name), "paper") or NONE for name in columns)]
    headers = ["Setting", *(record.label(name) for name in columns)]
    return html_table(headers, [papers, *lines], caption="Settings of each side")


def facts_table(record: Record) -> str:
    """Return the environment and the data of the run."""
    data, environment = table(record.result, "data"), table(record.result, "environment")
    byte_counts = {"train_bytes", "valid_bytes"}
    lines: list[list[object]] = [["created", text(record.result, "created") or NONE]]
    lines += [[key, NONE if value is None else str(value)] for key, value in environment.items()]
    for key, value in data.items():
        count = number(data, key) if key in byte_counts else None
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append([f"data: {key.replace('_', ' ')}", shown if count is None else f"{count:,.0f} ({scaled(count)}B)"])
    return html_table(["What", "Value"], lines, caption="Environment and data", wide=False)


def claims_table(record: Record) -> str:
    """Return the claims of the triangle, each held or not held."""
    from .markup import mark

    lines = [
        [text(claim, "claim") or NONE, mark(lookup(claim, "held")), text(claim, "detail")]
        for claim in rows(record.result, "triangle", "claims")
    ]
    return html_table(["Claim", "Verdict", "Detail"], lines, caption="Claims of sparse models, as measured") if lines else ""


def shares(record: Record) -> str:
    """Return the sentence on what the sparse side spent, as shares of the dense side's."""
    pairs = record.headline
    known = {
        word: mean([number(item, key) for item in pairs])
        for word, key in (("tokens", "token_share"), ("FLOPs", "flop_share"), ("seconds", "second_share"))
    }
    listed = [f"{percent(value)} of the {word}" for word, value in known.items() if value is not None]
    return "The sparse side spent " + ", ".join(listed) + " of its dense twin." if listed else ""
