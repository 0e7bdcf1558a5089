"""Page and pictures of gshard/quality, from its record and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gatewright.experiments.gshard_runs import BILINGUAL, MANY, SPARSE, TWIN
from gatewright.experiments.gshard_text import VERSES
from gatewright.experiments.pages import measured_with, rates_told
from gatewright.inspection.plots.learning import draw_learning
from gatewright.inspection.plots.rows import draw_rows

Record = dict[str, Any]

# Table 2: billions of tokens to cross-entropies of 0.7, 0.6 and 0.5.
PAPER_LEVELS = ("0.7", "0.6", "0.5")
PAPER_TOKENS: dict[str, tuple[float | None, ...]] = {
    "MoE(2048E, 36L)": (82, 175, 542),
    "MoE(2048E, 12L)": (176, 484, 1780),
    "MoE(512E, 36L)": (66, 170, 567),
    "MoE(512E, 12L)": (141, 486, None),
    "MoE(128E, 36L)": (321, 1074, None),
    "MoE(128E, 12L)": (995, None, None),
}
# Table 1: mean BLEU over 100 languages into English.
PAPER_BLEU = {
    **{"MoE(2048E, 36L)": 44.3, "MoE(2048E, 12L)": 41.3, "MoE(512E, 36L)": 43.7, "MoE(512E, 12L)": 40.0},
    **{"MoE(128E, 36L)": 39.0, "MoE(128E, 12L)": 36.7, "T(96L), dense": 36.9},
}


def quality_page(record: Record) -> str:
    """Return the page: claim, verdict, BLEU by language and source, tokens to cross-entropies, transfer."""
    verdict = record["verdict"]
    quick = " --quick" if record["quick"] else ""
    name = record["target"].replace("/", "-") + ("-quick" if record["quick"] else "")
    lines = [
        "# GShard: quality for experts and depth, on many languages into English",
        f"Command: `gatewright reproduce {record['target']}{quick}`. Claim: {record['claim']}.",
        f"**{verdict['sentence']}**",
        "\n".join(f"- {'held' if ok else 'not held'}: {goal}" for goal, ok in verdict["goals"].items()),
        f"![BLEU of every language, {SPARSE} less {TWIN}](" + f"{name}-languages.png)",
        "## BLEU by language",
        language_table(record),
        "## By source",
        _sources(record),
        f"![Dev loss along the training]({name}-loss.png)",
        "## Tokens to given cross-entropies (table 2)",
        token_table(record),
        "## Systems",
        _systems(record),
        "## A language with few pairs",
        _low(record),
        *(["## Pairs never seen together", unseen_table(record)] if MANY in record["systems"] else []),
        "## What was trained on what",
        _about(record),
        _samples(record),
        measured_with(record),
    ]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def _into_english(record: Record) -> list[str]:
    return [name for name in record["systems"] if name != MANY]


def language_table(record: Record) -> str:
    """Return BLEU of verses and catalogs together, every seed, and the mean."""
    names, plan = _into_english(record), record["plan"]["text"]
    rows = []
    for language in plan["languages"]:
        cells = [
            _numbers(
                (s["directions"][f"{language}-en"]["bleu"] for s in record["systems"][name]["seeds"]), ".2f"
            )
            for name in names
        ]
        pairs = record["data"]["pairs"]["train"][language]
        rows.append([f"{language}{' (cut)' if language == plan['low'] else ''}", f"{pairs:,}", *cells])
    means = [_numbers(map(_mean_bleu, record["systems"][name]["seeds"]), ".2f") for name in names]
    rows.append(["mean", "", *means])
    return _table(["language", "training pairs", *names], rows)


def _mean_bleu(seed: Record) -> float:
    return statistics.fmean(own["bleu"] for own in seed["directions"].values())


def _sources(record: Record) -> str:
    """Return means over languages and seeds by source: BLEU, its control, nats, what a wrong source costs."""
    head = ["source", "system", "languages", "BLEU", "BLEU against another line", "nats per token"]
    head += ["more with another line's source"]
    rows = []
    for source in _source_names(record):
        for name in _into_english(record):
            own = [
                d["sources"][source]
                for seed in record["systems"][name]["seeds"]
                for d in seed["directions"].values()
                if source in d["sources"]
            ]
            seeds = len(record["systems"][name]["seeds"])
            means = [statistics.fmean(o[key] for o in own) for key in ("bleu", "control_bleu")]
            nats = [statistics.fmean(o[key] / o["tokens"] for o in own) for key in ("nats", "wrong_nats")]
            cells = [f"{m:.2f}" for m in means] + [f"{nats[0]:.3f}", f"{nats[1] - nats[0]:+.3f}"]
            rows.append([source, name, str(len(own) // seeds), *cells])
    missing = [f"No {source}: {reason}." for source, reason in record["data"]["missing"].items()]
    return "\n\n".join([_table(head, rows), *missing])


def _source_names(record: Record) -> list[str]:
    parts = record["data"]["pairs"]
    return [part.partition("/")[2] for part in parts if part.startswith("test/")]


def token_table(record: Record) -> str:
    """Return our table in the paper's form, and the paper's."""
    levels = [f"{level:g}" for level in record["plan"]["levels"]]
    rows = [
        [name, *(_numbers((None if t is None else t / 1e6 for t in own[level]), ".2f") for level in levels)]
        for name, own in record["tokens_to"].items()
    ]
    theirs = [[name, *("-" if t is None else f"{t:g}" for t in own), f"{PAPER_BLEU[name]:.1f}"]
              for name, own in PAPER_TOKENS.items()]  # fmt: skip
    return "\n\n".join(
        [
            "Millions of tokens (both sides of a pair) until the dev loss, verses and catalogs of all "
            "languages, in nats per token and without the balance loss, was at each level; on a line between "
            "the points of the picture; \"-\" where it never was.",
            _table(["ours", *levels], rows),
            "The paper's, billions of tokens, and its mean BLEU (table 1; the dense T(96L): "
            f"{PAPER_BLEU['T(96L), dense']}); \"-\" where it was not reached:",
            _table(["the paper's", *PAPER_LEVELS, "BLEU"], theirs),
        ]
    )  # fmt: skip


def _systems(record: Record) -> str:
    head = ["system", "models", "parameters", "operations per token", "steps in all", "tokens in all"]
    head += ["training seconds", "last dev loss"]
    rows = []
    for name, own in record["systems"].items():
        took = [seed["train"] for seed in own["seeds"]]
        models = took[0]["models"]
        last = [t["curve"][-1]["dev"] for t in took if t["curve"]]
        rows.append(
            [
                name,
                str(models),
                f"{own['parameters']:,}{' each' if models > 1 else ''}",
                f"{own['operations']:,.0f}",
                _numbers((t["steps"] for t in took), ",d"),
                _numbers((t["tokens"] for t in took), ",d"),
                _numbers((t["seconds"] for t in took), ".0f"),
                _numbers(last, ".3f") or "-",
            ]
        )
    return _table(head, rows)


def _low(record: Record) -> str:
    """Return what the cut language comes to in every system."""
    plan = record["plan"]["text"]
    direction, pairs = f"{plan['low']}-en", record["data"]["pairs"]["train"][plan["low"]]
    rows = []
    for name in _into_english(record):
        own = [seed["directions"][direction] for seed in record["systems"][name]["seeds"]]
        cells = [_numbers((o["bleu"] for o in own), ".2f"), _numbers((o["control_bleu"] for o in own), ".2f")]
        nats = _numbers((o["nats"] / o["tokens"] for o in own), ".3f")
        wrong = _numbers(((o["wrong_nats"] - o["nats"]) / o["tokens"] for o in own), "+.3f")
        rows.append([name, *cells, nats, wrong])
    head = ["system", "BLEU", "against another line", "nats per token", "more with another line's source"]
    about = (
        f"Of {plan['low']} {100 * plan['low_share']:g} % of the training lines are left in every system "
        f"({pairs:,} pairs of at most {plan['longest']} ids); its test lines are all there."
    )
    return f"{about}\n\n{_table(head, rows)}"


def unseen_table(record: Record) -> str:
    """Return many-to-many by direction, the unseen ones first."""
    unseen = ["-".join(direction) for direction in record["plan"]["text"]["unseen"]]
    directions = record["systems"][MANY]["seeds"][0]["directions"]
    rows = []
    for name in [*unseen, *(own for own in directions if own not in unseen)]:
        own = directions[name]
        nats, wrong = (own[key] / own["tokens"] for key in ("nats", "wrong_nats"))
        cells = [f"{own['bleu']:.2f}", f"{own['control_bleu']:.2f}", f"{nats:.3f}", f"{wrong - nats:+.3f}"]
        rows.append([name, "never" if name in unseen else "yes", *cells])
    head = ["from-into", "in training", "BLEU", "against another line", "nats per token"]
    return _table([*head, "more with another line's source"], rows)


def _about(record: Record) -> str:
    """Return what was trained and tested on what, in a paragraph."""
    plan, systems = record["plan"], record["systems"]
    text, model = plan["text"], record["plan"]["model"]
    runs = [seed for own in systems.values() for seed in own["seeds"]]
    seconds = sum(s["train"]["seconds"] + sum(d["seconds"] for d in s["directions"].values()) for s in runs)
    rates = rates_told(plan["learning_rate"], {s["name"]: s.get("learning_rate") for s in plan["systems"]})
    some = next(iter(runs[0]["directions"].values()))["sources"]
    return (
        f"Verses (quran-json) of {', '.join(text['languages'])} and, where it has them, catalogs of Gramps, "
        f"pairs of at most {text['longest']} ids; paragraphs of the Debian handbook are in no training. "
        "Lines that are equal in any language, of either source, stand on one side; pieces "
        f"({text['source_pieces']} of the sources, {text['target_pieces']} of English) are learned from the "
        "training side. Every other layer is a mixture as in algorithm 1; in its place the dense twins have "
        "a layer of equal operations. Bilingual models take their share of the steps, so that all of them "
        f"together train as long as one of the others. Width {model['width']}, dropout {model['dropout']:g}; "
        f"{plan['steps']} steps of {plan['rows']} pairs, AdamW at {rates}, a cosine to a "
        f"tenth. Nothing is dropped where losses are measured. Beams {plan['beams']}, alpha "
        f"{plan['alpha']:g}, the first {plan['test_lines']} test lines of each language and source; BLEU "
        f"`{next(iter(some.values()))['signature']}`. Seeds {', '.join(map(str, plan['seeds']))} for "
        f"{' and '.join(plan['seeded'])}, {plan['seeds'][0]} for the others, all shown; {seconds / 60:.1f} "
        "CPU minutes in all. The paper's layers: both stacks' together."
    )


def _samples(record: Record) -> str:
    """Return a verse of the test side by the sparse model and its dense ones; catalogs and book are quoted
    nowhere.
    """
    systems = record["systems"]
    own = {name: systems[name]["seeds"][0]["directions"] for name in (SPARSE, TWIN, BILINGUAL)
           if name in systems}  # fmt: skip
    direction = next(iter(own[SPARSE]))
    given, wanted, _ = own[SPARSE][direction]["sources"][VERSES]["sample"]
    written = [f"- {name}: {d[direction]['sources'][VERSES]['sample'][2]}" for name, d in own.items()]
    head = f"The first verse of the test side, {direction}, seed {record['plan']['seeds'][0]}:"
    return "\n".join([head, "", f"- source: {given}", f"- reference: {wanted}", *written])


def quality_pictures(record: Record, work: Path) -> dict[str, Path]:
    """Draw what the sparse model gains in every language, and all dev losses, and return them by name."""
    systems = record["systems"]
    rows = []
    for language in record["plan"]["text"]["languages"]:
        both = zip(systems[SPARSE]["seeds"], systems[TWIN]["seeds"], strict=True)
        key = f"{language}-en"
        rows.append(
            (language, [m["directions"][key]["bleu"] - d["directions"][key]["bleu"] for m, d in both], None)
        )
    paths = {"languages": work / "languages.png", "loss": work / "loss.png"}
    draw_rows(rows, f"BLEU, {SPARSE} less {TWIN}: a dot per seed", paths["languages"])
    curves = {
        name: [
            ([p["tokens"] / 1e6 for p in seed["train"]["curve"]], [p["dev"] for p in seed["train"]["curve"]])
            for seed in own["seeds"]
        ]
        for name, own in systems.items()
        if name not in (BILINGUAL, MANY)
    }
    along = "millions of tokens of training, both sides of a pair"
    draw_learning(curves, "dev loss, nats per token", paths["loss"], along)
    return paths


def _numbers(values: Iterable[Any], form: str) -> str:
    return ", ".join("-" if value is None else format(value, form) for value in values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
