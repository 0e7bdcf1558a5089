"""Blocks of the pages for what the classics' own experiments came to: tables of 1991, 1994 and 2017."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gatewright.experiments.distill_pages import distilled_block


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
    place = record["environment"]
    lines += [
        "",
        f"Measured with `gatewright reproduce {record['target']}` on {place['processor']}, "
        f"{place['threads']} threads, torch {place['torch']}, commit `{place['commit']}`; every number is "
        f"taken from `reproductions/{source}`.",
    ]
    return "\n".join(lines) + "\n"


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
    place = record["environment"]
    lines += [
        "",
        f"Measured with `gatewright reproduce {record['target']}` on {place['processor']}, "
        f"{place['threads']} threads, torch {place['torch']}, commit `{place['commit']}`; every number is "
        f"taken from `reproductions/{source}`.",
    ]
    return "\n".join(lines) + "\n"


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
    place = record["environment"]
    lines += [
        "",
        f"Measured with `gatewright reproduce {record['target']}` on {place['processor']}, "
        f"{place['threads']} threads, torch {place['torch']}, commit `{place['commit']}`; every number is "
        f"taken from `reproductions/{source}`.",
    ]
    return "\n".join(lines) + "\n"


BLOCKS: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "table1": table1_block,
    "hme": hme_block,
    "gated": gated_block,
    "distilled": distilled_block,
}
