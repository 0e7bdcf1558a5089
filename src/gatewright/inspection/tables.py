"""Tables of the report: the sides, the domains, the settings, the environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .markup import Html, html_table, mark, missing, with_note
from .plots.bars import domain_gaps
from .record import Record, lookup, mean, number, rows, spread, table, text
from .words import NONE, bits, escape, flops, moment, percent, plural, rate, scaled, seconds, signed


def strong(words: str) -> Html:
    """Return escaped text in bold."""
    return Html(f"<b>{escape(words)}</b>")


def final_with_range(record: Record, name: str, *path: str) -> Html:
    """Return a side's mean final loss, with the range below it when there are several seeds."""
    values = record.values(name, *path)
    known = [value for value in values if value is not None]
    interval = f"{bits(min(known))} – {bits(max(known))}" if spread(values) is not None else ""
    return with_note(bits(mean(values)), interval)


def _budget(record: Record, name: str) -> str:
    return scaled(mean(record.values(name, "final", "tokens")) or number(record.first(name), "token_budget"))


def _duration(record: Record, name: str) -> str:
    return seconds(
        mean(record.values(name, "train_seconds")) or mean(record.values(name, "final", "seconds"))
    )


def sides_table(record: Record) -> str:
    """Return sizes, cost and outcome, one column per side; means over seeds where there are several."""
    names = record.names
    if not names:
        return missing("Sides")

    def line(title: str, show: Callable[[str], object]) -> list[object]:
        return [title, *(show(name) for name in names)]

    def fixed(title: str, write: Callable[[float | None], str], key: str) -> list[object]:
        return line(title, lambda name: write(number(record.first(name), key)))

    lines = [
        line("Kind", lambda name: "sparse" if record.is_sparse(name) else "dense"),
        line("Final bits per byte", lambda name: final_with_range(record, name, "final", "valid_bpb")),
        fixed("Total parameters", scaled, "total_parameters"),
        fixed("Active parameters", scaled, "active_parameters"),
        fixed("FLOPs per token, forward", flops, "forward_flops_per_token"),
        fixed("FLOPs per token, training", flops, "train_flops_per_token"),
        fixed("Learning rate", rate, "learning_rate"),
        line("Training tokens", lambda name: _budget(record, name)),
        line("Training FLOPs", lambda name: flops(mean(record.values(name, "final", "train_flops")))),
        line("Training time", lambda name: _duration(record, name)),
        line("Tokens per second", lambda name: scaled(mean(record.values(name, "tokens_per_second")))),
    ]
    several = len(record.seeds) > 1
    caption = f"Size, cost and outcome, {plural(len(record.seeds), 'seed')}"
    caption += ": means over seeds, range below" if several else ""
    return html_table(["", *(record.label(name) for name in names)], lines, caption=caption)


def domains_table(record: Record) -> str:
    """Return final bits per byte by domain and side, and the gap where two sides were compared."""
    names = [
        name
        for name in record.names
        if any(record.values(name, "final", "domains", d) for d in record.domains)
    ]
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
            line.append(with_note(signed(gap), "" if width is None else f"spread {bits(width)}"))
            line.append(NONE if gap is None else "sparse" if gap > 0 else "dense" if gap < 0 else "equal")
        lines.append(line)
    whole: list[object] = [strong("the whole validation text")]
    whole += [final_with_range(record, name, "final", "valid_bpb") for name in names]
    if gaps:
        gap = mean([number(item, "gap_bpb") for item in record.headline])
        whole += [
            strong(signed(gap)),
            NONE if gap is None else "sparse" if gap > 0 else "dense",
        ]
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
    lines = [
        [Html(f"<code>{escape(key)}</code>"), *(columns[name].get(key, "–") for name in columns)]
        for key in keys
    ]
    papers = ["paper", *(text(record.first(name), "paper") or NONE for name in columns)]
    headers = ["Setting", *(record.label(name) for name in columns)]
    return html_table(headers, [papers, *lines], caption="Settings of each side")


def facts_table(record: Record) -> str:
    """Return the environment and the data of the run."""
    data, environment = table(record.result, "data"), table(record.result, "environment")
    lines: list[list[object]] = [["created", moment(text(record.result, "created")) or NONE]]
    lines += [[key, NONE if value is None else str(value)] for key, value in environment.items()]
    for key, value in data.items():
        count = number(data, key) if key.endswith("_bytes") else None
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        lines.append(
            [f"data: {key.replace('_', ' ')}", shown if count is None else f"{count:,.0f} ({scaled(count)}B)"]
        )
    return html_table(["What", "Value"], lines, caption="Environment and data", wide=False)


def claims_table(record: Record) -> str:
    """Return the claims of the triangle, each held or not held."""
    lines = [
        [with_note(text(claim, "claim") or NONE, text(claim, "detail")), mark(lookup(claim, "held"))]
        for claim in rows(record.result, "triangle", "claims")
    ]
    return html_table(["Claim", "Verdict"], lines, caption="Claims, as measured", wide=False) if lines else ""


def shares(record: Record) -> str:
    """Return the sentence on what the sparse side spent, as shares of the dense side's."""
    pairs = record.headline
    known = {
        word: mean([number(item, key) for item in pairs])
        for word, key in (("tokens", "token_share"), ("FLOPs", "flop_share"), ("seconds", "second_share"))
    }
    listed = [f"{percent(value)} of the {word}" for word, value in known.items() if value is not None]
    return "The sparse side spent " + ", ".join(listed) + " of its dense twin." if listed else ""
