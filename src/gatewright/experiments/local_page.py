"""Page and picture of local_experts/table1, from its record and from nothing else."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatewright.experiments.pages import measured_with
from gatewright.inspection.plots.epochs import draw_epochs

Record = dict[str, Any]


def table1_page(record: Record) -> str:
    """Return the page: claim, verdict, each reading beside the paper, what was searched, every run."""
    plan = record["plan"]
    quick = " --quick" if record["quick"] else ""
    picture = f"local_experts-table1{'-quick' if record['quick'] else ''}-epochs.png"
    lines = [
        "# Table 1 of Adaptive Mixtures of Local Experts (1991)",
        "",
        f"Command: `gatewright reproduce {record['target']}{quick}`. Claim: {record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        f"![epochs of every run, beside the paper's]({picture})",
        "",
        f"Vowels i, I, a and ^ of Peterson and Barney (1952), two formants in kHz; speakers 1 to 50 to train "
        f"on, 51 to 75 to test. Error 1.3, one update per epoch with the gradient summed over the 400 cases, "
        f"no momentum, fp64; weights even from -{plan['init']:g} to {plan['init']:g}, the gate's 0. Seeds 0 "
        f"to {plan['seeds'] - 1}, all shown. Each system takes the best of the step sizes "
        f"{', '.join(f'{rate:g}' for rate in plan['rates'])}: the fewest epochs of {plan['search_seeds']} "
        "starts that all come through. An expert is left if the gate gives it more than 0.05 of some "
        f"training case. All batches together took {_cpu_seconds(record) / 60:.1f} CPU minutes.",
    ]
    for name, reading in record["readings"].items():
        lines += ["", f"## Reading {name}: {reading['about']}", "", *_systems(reading, record["paper"])]
        lines += ["", *_tests(reading["tests"])]
        lines += ["", *_searches(reading["systems"], plan)]
        lines += ["", *(f"- {size}: {_every_run(own)}" for size, own in reading["systems"].items())]
    lines += [
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


def _cpu_seconds(record: Record) -> float:
    systems = [own for reading in record["readings"].values() for own in reading["systems"].values()]
    batches = [batch for own in systems for batch in (own["search"], own["runs"], *own["inits"].values())]
    return sum(batch["cpu_seconds"] for batch in batches if batch is not None)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table; the first column is text, the others are numbers."""
    return [
        "| " + " | ".join(head) + " |",
        "|---" + "|--:" * (len(head) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _systems(reading: Record, paper: Record) -> list[str]:
    """Return a reading's table 1: ours, and the paper's in brackets."""
    rows = []
    for size, own in reading["systems"].items():
        train, test, epochs, spread = paper[size]
        if own["rate"] is None:
            rows.append(
                [size, f"- ({train})", f"- ({test})", f"- ({epochs})", f"- ({spread})", "none", "-", "-"]
            )
            continue
        got, runs = own["summary"], own["runs"]
        rows.append(
            [
                size,
                f"{got['train_percent']:.1f} ({train})",
                f"{got['test_percent']:.1f} ({test})",
                f"{_number(got['epochs_mean'])} ({epochs})",
                f"{_number(got['epochs_sd'])} ({spread})",
                f"{own['rate']:g}",
                f"{got['reached']} of {len(runs['epochs'])}",
                _left(runs["survivors"]) if size.startswith("local") else "-",
            ]
        )
    head = ["system, ours (paper's)", "train %", "test %", "epochs", "SD", "step size", "runs that end"]
    return table([*head, "experts left"], rows)


def _left(survivors: Sequence[int]) -> str:
    """Return how many runs end with how many experts."""
    return ", ".join(f"{count} in {runs} runs" for count, runs in sorted(Counter(survivors).items()))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _tests(tests: Sequence[Record]) -> list[str]:
    """Return the paper's four claims by t-test with pooled variance, one-sided."""
    rows = []
    for test in tests:
        if test["t"] is None:
            ours = ["-", "-", "no test"]
        else:
            p = f"{test['p']:.2g}" if test["p"] > 1e-12 else "below 1e-12"
            says = "yes" if test["p"] < 0.05 else "the reverse" if test["p"] > 0.95 else "no difference seen"
            ours = [f"{test['t']:.1f} ({test['degrees']})", p, says]
        rows.append([f"{test['fewer']} before {test['more']}", *ours, f"yes, at {test['paper']:g}"])
    return table(["fewer epochs", "t (degrees)", "p, one-sided", "here", "paper"], rows)


def _searches(systems: Record, plan: Record) -> list[str]:
    """Return mean epochs by step size, and by other starts where they were tried."""
    rates = plan["rates"]
    rows = [
        [size, *(_mean_of(own["search"], lambda _, used, rate=rate: used == rate) for rate in rates)]
        for size, own in systems.items()
    ]
    lines = [
        f"Mean and SD of the epochs by step size, {plan['search_seeds']} starts, at most "
        f"{plan['search_limit']} epochs:",
        "",
        *table(["step size", *(f"{rate:g}" for rate in rates)], rows),
    ]
    inits = list(dict.fromkeys(init for own in systems.values() for init in own["inits"]))
    if inits:
        rows = [[size, *(_mean_of(own["inits"].get(i)) for i in inits)] for size, own in systems.items()]
        lines += ["", "The same by the bound of the first weights, at the step sizes above:", ""]
        lines += table(["bound", *inits], rows)
    return lines


def _mean_of(batch: Record | None, take: Any = lambda seed, rate: True) -> str:
    """Return mean and SD of the epochs of some runs of a batch, or how many of them came through."""
    if batch is None:
        return "-"
    rows = zip(batch["seeds"], batch["rates"], batch["epochs"], strict=True)
    epochs = [found for seed, rate, found in rows if take(seed, rate)]
    through = [found for found in epochs if found is not None]
    if len(through) < len(epochs):
        return f"{len(through)} of {len(epochs)} end"
    spread = f" ± {statistics.stdev(through):.0f}" if len(through) > 1 else ""
    return f"{statistics.fmean(through):.0f}{spread}"


def _every_run(own: Record) -> str:
    if own["runs"] is None:
        return "not run: at no step size did every start come through"
    return "epochs " + " ".join("never" if e is None else str(e) for e in own["runs"]["epochs"])


def table1_pictures(record: Record, work: Path) -> dict[str, Path]:
    """Draw every run's epochs of every reading and return the picture by name."""
    path = work / "epochs.png"
    rows = []
    for name, reading in record["readings"].items():
        for size, own in reading["systems"].items():
            epochs = [] if own["runs"] is None else [e for e in own["runs"]["epochs"] if e is not None]
            rows.append((f"{name}: {size}", epochs, *record["paper"][size][2:]))
    draw_epochs(rows, path)
    return {"epochs": path}
