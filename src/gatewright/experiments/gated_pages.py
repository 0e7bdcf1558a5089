"""Pages and pictures of sparsely_gated/table6, table7, table9, from their records and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatewright.experiments.pages import measured_with
from gatewright.inspection.plots.rows import draw_rows

Record = dict[str, Any]
_PAPERS = "the paper's in brackets"


def table6_page(record: Record) -> str:
    """Return the page of table 6: both papers' columns, every seed, what held."""
    head = ["w_importance / w_load", "perplexity", "CV(Importance)", "CV(Load)", "max / mean load"]
    head += ["max / mean, counted, no noise", "idle experts"]
    rows = []
    for name, row in record["rows"].items():
        gates = [own["gates"] for own in row["seeds"] if own["perplexity"] is not None]
        cells = [_cell([own["perplexity"] for own in row["seeds"]], row["paper"]["perplexity"], 1)]
        columns = ("cv_importance", "cv_load", "max_over_mean")
        cells += [_cell([own[key] for own in gates], row["paper"][key], 2) for key in columns]
        cells.append(_numbers([own["clean_max_over_mean"] for own in gates], 2))
        rows.append([name, *cells, ", ".join(str(own["idle"]) for own in gates)])
    verdict = record["verdict"]
    checks = [
        f"- {'held' if held else 'not held'}: {name}"
        for part in ("goals", "directions")
        for name, held in verdict.get(part, {}).items()
    ]
    before = next(iter(record["rows"].values()))["seeds"][0].get("before_training")
    started = (
        "Before training both gate matrices are 0: with noise every expert is equally likely (max / mean "
        f"load {before['max_over_mean']:.2f}), without it all logits tie and every token goes to the first K "
        f"experts (max / mean {before['clean_max_over_mean']:.0f} = E / K)."
        if before
        else ""
    )
    picture_of = "max / mean load of every row"
    about = (
        "Perplexity, ours and the paper's, are of different texts and vocabularies: compare within a column. "
        "Importance and Load (eq 6 and 10) are summed over the test text with the gates' noise on; counts "
        "without noise are what evaluation routes."
    )
    return _page(
        record, "Table 6 of Outrageously Large Neural Networks (2017)", picture_of, head, rows,
        [about, started, "\n".join(checks)],
    )  # fmt: skip


def table7_page(record: Record) -> str:
    """Return the page of table 7: perplexity, operations and parameters, every seed, what limits it."""
    head = ["model", "perplexity", "over MoE-1-Wide", "operations per token", "parameters", "steps taken"]
    wide = _mean(record["rows"]["MoE-1-Wide"])
    rows = []
    for name, row in record["rows"].items():
        paper, own = row["paper"], _mean(row)
        relative = "-" if own is None or wide is None else f"{own / wide:.3f}"
        rows.append(
            [
                name,
                _cell([seed["perplexity"] for seed in row["seeds"]], paper["perplexity"], 1),
                f"{relative} ({paper['perplexity'] / 46.1:.3f})",
                f"{row['operations']:,.0f} ({paper['operations'] / 1e6:g}M)",
                f"{row['parameters']:,} ({paper['parameters'] / 1e6:g}M)",
                ", ".join(str(seed.get("steps", seed.get("diverged_at"))) for seed in row["seeds"]),
            ]
        )
    plan, data = record["plan"], record["data"]
    seen = plan["steps"] * plan["rows"] * plan["context"]
    gates = {name: record["rows"][name]["operations"] for name in ("MoE-4", "MoE-256")}
    notes = [
        "Operations are multiply-adds per token without embedding and softmax, parameters without both, as "
        "in the paper. At an eighth of its widths a flat gate of 256 experts adds "
        f"{100 * (gates['MoE-256'] / gates['MoE-4'] - 1):.0f} % to the operations (the paper: 3 %).",
        f"Every run sees at most {seen:,} tokens, {100 * seen / data['train_tokens']:.0f} % of the training "
        f"text; the paper's 10 epochs are 8 thousand million words. An expert of MoE-256 meets "
        f"{4 * seen / 256:,.0f} tokens in all (the paper: about 130 million words).",
    ]
    title = "Table 7 of Outrageously Large Neural Networks (2017)"
    return _page(record, title, "perplexity of every model", head, rows, notes)


def table9_page(record: Record) -> str:
    """Return the page of table 9: the chosen experts and the contexts that they fire on most strongly."""
    head = ["seed", "expert", "share of the load", "commonest token", "of its strongest", "of all text"]
    rows, contexts = [], []
    for own in record["seeds"]:
        for chosen in own["experts"][: record["plan"]["shown"]]:
            rows.append(
                [
                    str(own["seed"]),
                    str(chosen["expert"]),
                    f"{100 * chosen['load_share']:.1f} %",
                    f"`{chosen['token']}`",
                    f"{100 * chosen['purity']:.0f} %",
                    f"{100 * chosen['token_share']:.2f} %",
                ]
            )
            lines = [f"- {line}" for line in chosen["contexts"]]
            contexts.append("\n".join([f"## Seed {own['seed']}, expert {chosen['expert']}", "", *lines]))
    notes = [
        "Inputs are sorted by the weight that the gate gives the expert, as in the paper, and the "
        f"{record['plan']['strongest']} strongest are counted: how many of them are the same token. Experts "
        "with less than half an even load are left out, the purest come first. Token in [brackets]. The "
        "paper's table shows three encoder experts of a translation model: 381 (research, innovation), 752 "
        "(`a` before the object of phrases such as play a leading role), 2004 (quick, rapidly).",
        *contexts,
    ]
    return _page(
        record, "Table 9 of Outrageously Large Neural Networks (2017)", "share of the commonest token", head,
        rows, notes,
    )  # fmt: skip


def picture(record: Record, work: Path, column: str) -> dict[str, Path]:
    """Draw one column of table 6 or 7 and return the picture by name; perplexities over the first row's."""
    rows, path = record["rows"], work / "rows.png"
    first = next(iter(rows))
    if column == "perplexity":
        drawn = [
            (
                name,
                [
                    own["perplexity"] / base["perplexity"]
                    for own, base in zip(row["seeds"], rows[first]["seeds"], strict=True)
                    if own["perplexity"] and base["perplexity"]
                ],
                row["paper"]["perplexity"] / rows[first]["paper"]["perplexity"],
            )
            for name, row in rows.items()
        ]
        draw_rows(drawn, f"perplexity over that of {first}: a dot per seed; grey, the paper's", path)
    else:
        drawn = [
            (name, [own["gates"][column] for own in row["seeds"] if own.get("gates")], row["paper"][column])
            for name, row in rows.items()
        ]
        draw_rows(drawn, "max / mean load: a dot per seed; grey, the paper's", path, logarithmic=True)
    return {"rows": path}


def _page(
    record: Record, title: str, picture_of: str, head: list[str], rows: list[list[str]], notes: list[str]
) -> str:
    """Return a page: claim, verdict, picture, table, notes, machine."""
    plan = record["plan"]
    quick = " --quick" if record["quick"] else ""
    name = record["target"].replace("/", "-") + ("-quick" if record["quick"] else "")
    lines = [
        f"# {title}",
        f"Command: `gatewright reproduce {record['target']}{quick}`. Claim: {record['claim']}.",
        f"**{record['verdict']['sentence']}**",
        f"![{picture_of}]({name}-rows.png)",
        _table(head, rows),
        f"Ours, {_PAPERS}. Embedding, LSTM, mixture, LSTM of width 64, tokenizer {plan['tokenizer']}, "
        f"{plan['steps']} steps at most of {plan['rows']} texts of {plan['context']} tokens, AdamW at "
        f"{plan['learning_rate']:g}, a cosine to a tenth, no dropout; the best of {plan['evaluations']} "
        f"evaluations on one half of the held-out text counts, training ends after {plan['patience']} "
        f"without a new best, figures are of the other half. Seeds {', '.join(map(str, plan['seeds']))}, all "
        f"shown; {_minutes(record):.1f} CPU minutes in all.",
        *(note for note in notes if note),
        measured_with(record),
    ]
    return "\n\n".join(lines) + "\n"


def _minutes(record: Record) -> float:
    runs = (
        record["seeds"] if "seeds" in record else [s for row in record["rows"].values() for s in row["seeds"]]
    )
    return sum(float(own.get("cpu_seconds", 0)) for own in runs) / 60


def _mean(row: Record) -> float | None:
    values = [own["perplexity"] for own in row["seeds"]]
    return None if None in values else statistics.fmean(values)


def _numbers(values: Sequence[float | None], digits: int) -> str:
    return ", ".join("diverged" if value is None else f"{value:.{digits}f}" for value in values)


def _cell(values: Sequence[float | None], paper: float, digits: int) -> str:
    """Return every seed's figure, and the paper's in brackets."""
    return f"{_numbers(values, digits)} ({paper:g})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
