"""Result pages in Markdown, written from the records and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]


def measured_with(record: Mapping[str, Any]) -> str:
    """Return what a result was measured with: version and commit, torch, threads, processor and date."""
    where = record["environment"]
    return (
        f"gatewright {where['gatewright']} at commit {where['commit']}, torch {where['torch']}, "
        f"{where['threads']} threads, {where['processor']}, {record['created']}."
    )


def taken_from(record: Mapping[str, Any], source: str) -> str:
    """Return, for a page in docs, what measured a result and which file its numbers are taken from."""
    place = record["environment"]
    return (
        f"Measured with `gatewright reproduce {record['target']}` on {place['processor']}, "
        f"{place['threads']} threads, torch {place['torch']}, commit `{place['commit']}`; every number is "
        f"taken from `reproductions/{source}`."
    )


def rates_told(shared: float, own: Mapping[str, float | None], of: str = "") -> str:
    """Return which side was trained at which peak rate, from the rate of a plan and those that sides have of
    their own; `of` is what follows where one is all sides'.
    """
    by_rate: dict[float, list[str]] = {}
    for name, rate in own.items():
        by_rate.setdefault(shared if rate is None else rate, []).append(name)
    if len(by_rate) == 1:
        return f"{next(iter(by_rate)):g}{of}"
    return "; ".join(f"{rate:g} for {' and '.join(names)}" for rate, names in by_rate.items())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _sweep_part(sweep: Record | None) -> str:
    if sweep is None:
        return "Learning rates: the recorded ones; this form does not sweep."
    entries = {(e["kind"], e["learning_rate"]): e["valid_bpb"] for e in sweep["entries"]}
    rates = sorted({e["learning_rate"] for e in sweep["entries"]})
    best = {
        k: min((v, r) for (kind, r), v in entries.items() if kind == k and v is not None)[1]
        for k in ("dense", "sparse")
    }

    def cell(kind: str, rate: float) -> str:
        bits = entries.get((kind, rate))
        text = "-" if bits is None else f"{bits:.4f}"
        return f"**{text}**" if best[kind] == rate else text

    rows = [[f"{rate:g}", cell("dense", rate), cell("sparse", rate)] for rate in rates]
    tokens = {e["kind"]: e["tokens"] for e in sweep["entries"]}
    return (
        f"Learning rates, final bits per byte, seed 0 (dense on {tokens['dense']:,} tokens, sparse on "
        f"{tokens['sparse']:,}; best in "
        f"bold):\n\n{_table(['rate', 'dense', 'sparse'], rows)}"
    )


def _comparison(c: Record) -> list[str]:
    speed = {k: "never" if v is None else f"{v:.2f}x" for k, v in c["speedup"].items()}
    ratio = c["step_time_ratio"]
    return [
        str(c["seed"]),
        f"{c['dense_bpb']:.4f}",
        f"{c['sparse_bpb']:.4f}",
        f"{c['gap_bpb']:+.4f}",
        f"{100 * c['token_share']:.0f} %",
        f"{100 * c['second_share']:.0f} %",
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "-",
        f"{speed['tokens']} / {speed['flops']} / {speed['seconds']}",
    ]


def race_page(record: Record) -> str:
    """Return the page of a reproduced race: claim, machine, rates, every seed, and whether it held."""
    race = record["race"]
    where = race["environment"]
    rows = [_comparison(c) for c in race["comparisons"]]
    head = [
        "seed",
        "dense",
        "sparse",
        "gap",
        "tokens",
        "seconds",
        "step time",
        "speed-up: tokens / FLOPs / seconds",
    ]
    sides = {side["name"]: side for side in race["runs"][0]["sides"]}
    sizes = [
        [
            name,
            s["label"],
            f"{s['total_parameters']:,}",
            f"{s['active_parameters']:,}",
            f"{s['forward_flops_per_token']:,.0f}",
            f"{s['learning_rate']:g}",
            f"{s['steps']:,}",
        ]
        for name, s in sides.items()
    ]
    data = race["data"]
    flags = " --quick" if record["quick"] else ""
    form = " (quick form)" if record["quick"] else ""
    measure = (
        f"Bits per byte on {data['eval_bytes']:,} bytes of validation text from {len(data['domains'])} "
        "domains; gap = dense - sparse, above 0 is better for the sparse model. Step time: sparse over "
        "dense, median of turns taken in the same round (10th to 90th percentile). Speed-up: what the dense "
        "twin spent on its final quality, over what the sparse model spent until it had that quality."
    )
    machine = f"{where['processor']}, {where['threads']} threads, torch {where['torch']}"
    version = f"gatewright {where['gatewright']} at commit {where['commit']}, {race['created']}"
    origin = f"Command: `gatewright reproduce {record['target']}{flags}`. {machine}, {version}."
    columns = ["side", "model", "parameters", "active", "forward FLOPs per token", "rate", "steps"]
    parts = [
        f"# {record['target']}{form}",
        f"Claim: {record['claim']}.",
        race["verdict"]["sentence"],
        _table(head, rows),
        measure,
        _table(columns, sizes),
        _sweep_part(record["sweep"]),
        origin,
    ]
    return "\n\n".join(parts) + "\n"
