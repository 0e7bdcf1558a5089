"""Blocks of the pages for what the classics' own experiments came to: tables of 1991, 1994 and 2017."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gatewright.experiments.distill_pages import distilled_block
from gatewright.experiments.finetune_pages import tuned_block
from gatewright.experiments.gshard_page import language_table, token_table
from gatewright.experiments.interference import text_table, vowel_table
from gatewright.experiments.pages import taken_from
from gatewright.experiments.rates import rates_table


def table1_block(record: Mapping[str, Any], source: str) -> str:
    """Return table 1 of 1991 as a sentence, a row per reading and system, and where it was measured."""
    lines = [f"The expectation {record['verdict']['sentence']}".rstrip(".") + ".", ""]
    lines += ["| reading | system | step size | epochs, mean and SD | train % | test % | runs that end |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|"]
    for name, reading in record["readings"].items():
        for size, own in reading["systems"].items():
            if own["rate"] is None:
                lines.append(f"| {name} | {size} | none | - | - | - | - |")
                continue
            got, runs = own["summary"], len(own["runs"]["epochs"])
            epochs = " ± ".join(
                "-" if got[key] is None else f"{got[key]:.0f}" for key in ("epochs_mean", "epochs_sd")
            )
            lines.append(
                f"| {name} | {size} | {own['rate']:g} | {epochs} | {got['train_percent']:.1f} "
                f"| {got['test_percent']:.1f} | {got['reached']} of {runs} |"
            )
    return "\n".join([*lines, "", taken_from(record, source)]) + "\n"


def hme_block(record: Mapping[str, Any], source: str) -> str:
    """Return table 1 of 1994 as a sentence, a row per system, and where it was measured."""
    lines = [f"The expectation {record['verdict']['sentence']}.", ""]
    lines += [
        "| system | relative error, mean and SD | the paper's | epochs | the paper's |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, own in record["systems"].items():
        got, (error, epochs) = own["summary"], record["paper"][name]
        spread = "" if got["error_sd"] is None else f" ± {got['error_sd']:.3f}"
        passes = ["-", "-"] if epochs is None else [f"{got['epochs_mean']:.0f}", str(epochs)]
        lines.append(
            f"| {name} | {got['error_mean']:.3f}{spread} | {error:.2f} | {passes[0]} | {passes[1]} |"
        )
    return "\n".join([*lines, "", taken_from(record, source)]) + "\n"


def gated_block(record: Mapping[str, Any], source: str) -> str:
    """Return a table of 2017 as a sentence, a row per model or expert, and where it was measured."""
    lines = [f"The expectation {record['verdict']['sentence']}".rstrip(".") + ".", ""]
    if "rows" in record:
        lines += ["| row | perplexity by seed | CV(Importance) | CV(Load) | max / mean load |"]
        lines += ["|---|---|--:|--:|--:|"]
        for name, row in record["rows"].items():
            seeds = row["seeds"]
            reached = ["diverged" if s["perplexity"] is None else f"{s['perplexity']:.2f}" for s in seeds]
            gates = [s["gates"] for s in seeds if s.get("gates")]
            columns = [
                f"{sum(own[key] for own in gates) / len(gates):.2f}" if gates else "-"
                for key in ("cv_importance", "cv_load", "max_over_mean")
            ]
            lines.append(f"| {name} | {', '.join(reached)} | {' | '.join(columns)} |")
    else:
        lines += ["| seed | expert | commonest token | of its strongest inputs | of all text |"]
        lines += ["|--:|--:|---|--:|--:|"]
        for seed in record["seeds"]:
            for own in seed["experts"][: record["plan"]["shown"]]:
                lines.append(
                    f"| {seed['seed']} | {own['expert']} | `{own['token']}` | {100 * own['purity']:.0f} % "
                    f"| {100 * own['token_share']:.2f} % |"
                )
    return "\n".join([*lines, "", taken_from(record, source)]) + "\n"


def interference_block(record: Mapping[str, Any], source: str) -> str:
    """Return what something new does to what is known, of vowels and of text, and where it was measured."""
    lines = [f"The expectation {record['verdict']['sentence']}.", "", *vowel_table(record["vowels"]), ""]
    lines += [*text_table(record["text"]["runs"]), "", taken_from(record, source)]
    return "\n".join(lines) + "\n"


def translation_block(record: Mapping[str, Any], source: str) -> str:
    """Return translation of 2017 as a sentence, BLEU of every pair and system, and where it was measured."""
    systems = record["systems"]
    names = list(systems)
    lines = [f"The expectation {record['verdict']['sentence']}.", "", f"| | {' | '.join(names)} |"]
    lines += ["|---" + "|--:" * len(names) + "|"]

    def row(name: str, of: Callable[[Mapping[str, Any]], float]) -> str:
        cells = [", ".join(f"{of(seed):.2f}" for seed in systems[system]["seeds"]) for system in names]
        return f"| {name} | {' | '.join(cells)} |"

    for pair in systems[names[0]]["seeds"][0]["pairs"]:
        lines.append(row(pair.replace("-", " to "), lambda seed, pair=pair: seed["pairs"][pair]["bleu"]))  # type: ignore[misc]
    lines.append(row("mean BLEU", lambda seed: seed["mean_bleu"]))
    lines.append(row("dev perplexity", lambda seed: seed["perplexity"]))
    lines.append(row("training minutes", lambda seed: seed["train"]["seconds"] / 60))
    return "\n".join([*lines, "", "BLEU by seed. " + taken_from(record, source)]) + "\n"


def quality_block(record: Mapping[str, Any], source: str) -> str:
    """Return quality of 2020 as a sentence, BLEU by language, table 2, and where it was measured."""
    first = f"The expectation {record['verdict']['sentence']}."
    held = [f"- {'held' if ok else 'not held'}: {goal}" for goal, ok in record["verdict"]["goals"].items()]
    tables = language_table(dict(record)), token_table(dict(record))
    return (
        "\n\n".join([first, "\n".join(held), *tables, "BLEU by seed. " + taken_from(record, source)]) + "\n"
    )


def slots_block(record: Mapping[str, Any], source: str) -> str:
    """Return how one batch fills its experts' places as a sentence, and where it was measured."""
    return f"Drawn: {record['verdict']['sentence']}.\n\n{taken_from(record, source)}\n"


def rates_block(record: Mapping[str, Any], source: str) -> str:
    """Return a sweep of learning rates: sentence, table, and where it was measured."""
    lines = [f"{record['verdict']['sentence']}", "", *rates_table(dict(record))]
    return "\n".join([*lines, taken_from(record, source)]) + "\n"


BLOCKS: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "table1": table1_block,
    "hme": hme_block,
    "gated": gated_block,
    "interference": interference_block,
    "translation": translation_block,
    "distilled": distilled_block,
    "gshard_quality": quality_block,
    "slots": slots_block,
    "rates": rates_block,
    "finetuned": tuned_block,
}
