"""Pages of the reproductions of deep_moe, and their tables for the papers' page, from records alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from gatewright.experiments.local_page import table
from gatewright.experiments.pages import measured_with

Record = dict[str, Any]

_DATA = {
    "digits": "The small digits, 8 x 8 pixels on a canvas of 16 x 16 (1,500 to train on, 297 to test)",
    "mnist": "MNIST, 28 x 28 pixels on a canvas of 36 x 36 (60,000 to train on, 10,000 to test)",
    "vowels": "Dutch vowels of Pols and Van Nierop (1973): three formants and their levels, 12 vowels; each "
    "third speaker is held out (50 to train on, 25 to test)",
}


def page_of(record: Record, title: str, picture: str, alt: str, notes: Sequence[str]) -> str:
    """Return a page: claim, verdict, picture, tables, how it was run, where."""
    quick = record["quick"]
    name = record["target"].replace("/", "-") + ("-quick" if quick else "")
    lines = [
        f"# {title}",
        "",
        f"Command: `gatewright reproduce {record['target']}{' --quick' if quick else ''}`. Claim: "
        f"{record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        f"![{alt}]({name}-{picture}.png)",
        "",
        *tables_of(record),
        "",
        *notes,
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


def block(record: Record, source: str) -> str:
    """Return what the paper's page shows of a record: verdict, tables and where it was measured."""
    where = record["environment"]
    lines = [
        f"The expectation {record['verdict']['sentence']}.",
        "",
        *tables_of(record),
        "",
        f"Measured with `gatewright reproduce {record['target']}{' --quick' if record['quick'] else ''}` on "
        f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, commit "
        f"`{where['commit']}`; every number is taken from `reproductions/{source}`.",
    ]
    return "\n".join(lines) + "\n"


def tables_of(record: Record) -> list[str]:
    """Return a record's tables as lines of Markdown."""
    return _TABLES[record["target"]](record)


def _how(record: Record, margin: float) -> str:
    """Return one paragraph: data, recipe, seeds and how long it took."""
    plan, recipe = record["plan"], record["plan"]["recipe"]
    shifts = (
        ""
        if plan["data"] == "vowels"
        else ", in training each at a place drawn anew from the 81 within 4 pixels, in tests at a fixed one"
    )
    minutes = sum(run["cpu_seconds"] for run in runs_of(record)) / 60
    return (
        f"{_DATA[plan['data']]}{shifts}. Stochastic gradient descent, batches of {recipe['batch']}, step "
        f"size {recipe['rate']:g}, momentum {recipe['momentum']:g}; {recipe['first']} epochs under the "
        f"constraint with margin {margin:g}, then {recipe['second']} without. "
        f"Seeds 0 to {plan['seeds'] - 1}, all shown. All runs together took {minutes:.1f} CPU minutes."
    )


def runs_of(record: Record) -> list[Record]:
    """Return all runs of a record."""
    if "runs" in record:
        return list(record["runs"])
    if "runs_by_arm" in record:
        return [run for runs in record["runs_by_arm"].values() for run in runs]
    return [run for arms in record["sizes"].values() for runs in arms.values() for run in runs]


def _spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def figure2_page(record: Record) -> str:
    """Return figure 2's page."""
    notes = [
        "Each cell: the mutual information of the layer's expert with the place or the class, from sums of "
        "gates over test pictures that are shown at all 81 places each, as a share of the entropy of the "
        "gate's mean (1: the place tells the expert). Used: exp of that entropy. Shared: the information of "
        "the two layers' experts, from sums of g1 g2, as a share of the smaller entropy.",
        "",
        _how(record, record["settings"]["margin"]),
    ]
    return page_of(
        record, "Figure 2 of a deep mixture of experts (2013): where and what", "maps", _MAPS, notes
    )


_MAPS = "mean gate of every expert by place and by class, seed 0"


def _figure2_tables(record: Record) -> list[str]:
    rows = []
    for run in record["runs"]:
        cells = [str(run["seed"])]
        for layer in run["tells"]:
            cells += [f"{layer['known'][of]:.3f}" for of in ("place", "class")] + [
                f"{layer['effective']:.2f}"
            ]
        rows.append([*cells, f"{run['tells'][0]['shared']:.3f}", f"{run['test_error']:.2f}"])
    every = [run["tells"] for run in record["runs"]]
    means = ["mean ± SD"]
    for layer in (0, 1):
        means += [_spread([run[layer]["known"][of] for run in every], 3) for of in ("place", "class")]
        means += [_spread([run[layer]["effective"] for run in every], 2)]
    means += [_spread([run[0]["shared"] for run in every], 3)]
    means += [_spread([run["test_error"] for run in record["runs"]], 2)]
    head = ["seed", *(f"layer {n}: {what}" for n in (1, 2) for what in ("place", "class", "used"))]
    return table([*head, "shared", "test error, %"], [*rows, means])


def collapse_page(record: Record) -> str:
    """Return the page of the runs without the constraint."""
    notes = [
        "Experts' worth in use: exp of the entropy of the mean gate, over the last epoch of either phase in "
        "training, and at the end over test pictures that are shown at all 81 places each.",
        "",
        _how(record, record["settings"]["margin"])
        + " Without the constraint: as many epochs, none of them under "
        "it.",
    ]
    title = "A deep mixture of experts (2013) without its constraint"
    return page_of(record, title, "experts", "experts' worth in use over training, every seed", notes)


def _collapse_tables(record: Record) -> list[str]:
    first = record["plan"]["recipe"]["first"]
    rows = []
    for name, runs in record["runs_by_arm"].items():
        for run in runs:
            begun, end = run["curve"][max(first - 1, 0)]["effective"], run["curve"][-1]["effective"]
            use = [", ".join(f"{value:.2f}" for value in values) for values in (begun, end, run["left"])]
            rows.append([f"{name}, seed {run['seed']}", *use, f"{run['test_error']:.2f}"])
    head = [
        "run",
        f"used in epoch {first}, layers 1, 2",
        "used in the last",
        "used in tests",
        "test error, %",
    ]
    return table(head, rows)


def table1_page(record: Record) -> str:
    """Return table 1's page."""
    notes = [
        "Error in %, mean and standard deviation over seeds; in brackets the paper's, on MNIST. The names "
        "give the hidden units of each layer's experts and gates. Single: the last layer has one expert and "
        "no gate; concat: its experts stand side by side; plain: a net of two hidden layers with as many "
        "weights as the mixture.",
        "",
        _how(record, record["plan"]["margin"]),
    ]
    return page_of(
        record, "Table 1 of a deep mixture of experts (2013)", "errors", "test errors of all runs", notes
    )


def _error_tables(record: Record, scale: float, digits: int) -> list[str]:
    """Return one table for test and one for training: a row per size, a column per top."""
    lines: list[str] = []
    for part, place in (("test", 0), ("train", 1)):
        rows = []
        arms = list(dict.fromkeys(arm for own in record["sizes"].values() for arm in own))
        for size, own in record["sizes"].items():
            cells = [size]
            for column, arm in enumerate(arms):
                told = record["paper"][size][place][column] if arm in own else None
                ours = _spread([run[f"{part}_error"] for run in own[arm]], digits) if arm in own else "-"
                cells.append(ours if told is None else f"{ours} ({scale * told:.{digits}f})")
            rows.append(cells)
        word = "test" if part == "test" else "training"
        lines += [*([""] if lines else []), *table([f"{word} error, %, ours (the paper's)", *arms], rows)]
    return lines


def _table1_tables(record: Record) -> list[str]:
    sizes = [
        [size, *(f"{own[arm][0]['parameters']:,}" for arm in own)] for size, own in record["sizes"].items()
    ]
    arms = max((list(own) for own in record["sizes"].values()), key=len)
    sizes = [row + ["-"] * (len(arms) + 1 - len(row)) for row in sizes]
    return [*_error_tables(record, 1.0, 2), "", *table(["weights", *arms], sizes)]


def table2_page(record: Record) -> str:
    """Return table 2's page."""
    notes = [
        "The paper's data, a sample of spoken searches, are private: its figures (40 phones, 440 numbers per "
        "case, about a million cases) stand in brackets for the order of the arms alone. What is repeated is "
        "the form, 4 and 16 experts of 128 units, gates of 64, and the statistic of figure 5. Shared: the "
        "mutual information of the two layers' experts, from sums of g1 g2 over the test cases, as a share "
        "of the smaller entropy. Farthest: the greatest distance (half the sum of differences) of an "
        "expert's row from the mean row.",
        "",
        _how(record, record["plan"]["margin"]),
    ]
    title = "Table 2 and figure 5 of a deep mixture of experts (2013), on vowels"
    return page_of(record, title, "pairs", "second layer's experts given the first's, seed 0", notes)


def _table2_tables(record: Record) -> list[str]:
    rows = []
    for run in record["sizes"]["deep-moe-speech"]["mixture"]:
        own = run["pairs"]
        used = ", ".join(f"{value:.2f}" for value in own["effective"])
        rows.append([str(run["seed"]), f"{own['shared']:.3f}", f"{own['farthest']:.3f}", used])
    head = ["seed", "shared", "farthest", "experts' worth in use, layers 1 (of 4), 2 (of 16)"]
    return [*_error_tables(record, 100.0, 1), "", *table(head, rows)]


_TABLES: dict[str, Callable[[Record], list[str]]] = {
    "deep_moe/figure2": _figure2_tables,
    "deep_moe/collapse": _collapse_tables,
    "deep_moe/table1": _table1_tables,
    "deep_moe/table2": _table2_tables,
}
