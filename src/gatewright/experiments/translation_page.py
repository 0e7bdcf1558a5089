"""Page and picture of sparsely_gated/translation, from its record and from nothing else."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from gatewright.experiments.pages import measured_with
from gatewright.inspection.plots.rows import draw_rows

Record = dict[str, Any]

# Table 5: BLEU of GNMT-Mono, GNMT-Multi, MoE-Multi; dev perplexity of the last two.
PAPER_BLEU: dict[str, tuple[float, float, float]] = {
    "fr-en": (36.47, 34.40, 37.46),
    "de-en": (31.77, 31.17, 34.80),
    "ja-en": (23.41, 21.62, 25.91),
    "ko-en": (25.42, 22.87, 28.71),
    "pt-en": (44.40, 42.53, 46.13),
    "es-en": (38.00, 36.04, 39.39),
    "en-fr": (35.37, 34.00, 36.59),
    "en-de": (26.43, 23.15, 24.53),
    "en-ja": (23.66, 21.10, 22.78),
    "en-ko": (19.75, 18.41, 16.62),
    "en-pt": (38.40, 37.35, 37.90),
    "en-es": (34.50, 34.25, 36.21),
}
PAPER_PERPLEXITY = {"GNMT-Multi": 4.14, "MoE-Multi": 3.35}
SYSTEMS = ("GNMT-Mono", "GNMT-Multi", "MoE-Multi")


def translation_page(record: Record) -> str:
    """Return the page: claim, verdict, BLEU of every pair and seed beside the paper's, sizes, examples."""
    quick = " --quick" if record["quick"] else ""
    name = record["target"].replace("/", "-") + ("-quick" if record["quick"] else "")
    lines = [
        "# Table 5 of Outrageously Large Neural Networks (2017): many pairs in one model",
        f"Command: `gatewright reproduce {record['target']}{quick}`. Claim: {record['claim']}.",
        f"**{record['verdict']['sentence']}**",
        "\n".join(
            f"- {'held' if ok else 'not held'}: {goal}" for goal, ok in record["verdict"]["goals"].items()
        ),
        f"![BLEU of every pair, MoE-Multi less GNMT-Multi]({name}-pairs.png)",
        _bleu_table(record),
        _system_table(record),
        _about(record),
        _examples(record),
        measured_with(record),
    ]
    return "\n\n".join(lines) + "\n"


def _about(record: Record) -> str:
    """Return what was trained and tested on what, in a paragraph."""
    plan, lines, pieces = record["plan"], record["data"]["lines"], record["data"]["pieces"]
    model, systems = plan["model"], record["systems"]
    kinds = [part for part in lines if part not in ("train", "dev")]
    any_pair = next(iter(systems["MoE-Multi"]["seeds"][0]["pairs"].values()))
    minutes = sum(
        seed["train"]["seconds"] + seed["decoding_seconds"]
        for own in systems.values()
        for seed in own["seeds"]
    )
    return (
        "Verses of the Quran and words and short sentences of a program's catalogs (Gramps) in English and "
        f"{len(plan['languages'])} languages ({', '.join(plan['languages'])}), of at most {plan['longest']} "
        f"ids in each: {lines['train']} lines to train on, {lines['dev']} for perplexity, and of "
        + " and ".join(f"{lines[kind]} {kind}" for kind in kinds)
        + f" {any_pair['lines']} translated, as many of each. Lines that are equal in any language stand on "
        "one side, and the pieces of the BPE "
        f"({pieces}) are learned from the training side alone. GNMT-Multi and the models of one pair "
        "(GNMT-Mono, here of the same size) have a dense layer of equal operations in each mixture's place; "
        "a model of one pair takes its share of the steps: each system trains on as many pairs in all. "
        f"Width {model['width']}, {model['num_experts']} experts of {model['expert_width']} units, K = "
        f"{model['num_selected']}, dropout {model['dropout']:g}; {plan['steps']} steps of {plan['rows']} "
        f"pairs, AdamW at {plan['learning_rate']:g}, a cosine to a tenth; beams {plan['beams']}, alpha "
        f"{plan['alpha']:g}. BLEU: `{any_pair['signature']}` (the paper's: multi-bleu on tokenised text of "
        "other corpora, with models thousands of times as large: compare differences, not levels). Seeds "
        f"{', '.join(map(str, plan['seeds']))}, all shown; {minutes / 60:.1f} CPU minutes in all."
    )


def _bleu_table(record: Record) -> str:
    systems = record["systems"]
    head = ["pair", *SYSTEMS, "MoE-Multi less GNMT-Multi", "the paper's"]
    rows = []
    for pair in systems["MoE-Multi"]["seeds"][0]["pairs"]:
        own = {name: [s["pairs"][pair]["bleu"] for s in systems[name]["seeds"]] for name in SYSTEMS}
        more = [m - d for m, d in zip(own["MoE-Multi"], own["GNMT-Multi"], strict=True)]
        paper = PAPER_BLEU.get(pair)
        theirs = (
            "-" if paper is None else f"{' / '.join(f'{b:.2f}' for b in paper)}, {paper[2] - paper[1]:+.2f}"
        )
        cells = [_numbers(own[name], ".2f") for name in SYSTEMS]
        rows.append([pair.replace("-", " to "), *cells, _numbers(more, "+.2f"), theirs])
    means = {name: [s["mean_bleu"] for s in systems[name]["seeds"]] for name in SYSTEMS}
    more = [m - d for m, d in zip(means["MoE-Multi"], means["GNMT-Multi"], strict=True)]
    paper_means = [sum(row[i] for row in PAPER_BLEU.values()) / len(PAPER_BLEU) for i in range(3)]
    theirs = (
        f"{' / '.join(f'{b:.2f}' for b in paper_means)}, {paper_means[2] - paper_means[1]:+.2f} (12 pairs)"
    )
    rows.append(["mean", *(_numbers(means[n], ".2f") for n in SYSTEMS), _numbers(more, "+.2f"), theirs])
    return _table(head, rows)


def _system_table(record: Record) -> str:
    head = ["system", "dev perplexity (paper's)", "parameters", "operations per target token"]
    head += [
        "another line's source costs, nats per token",
        "mean BLEU by kind",
        "models",
        "steps in all",
        "tokens in all",
        "training seconds",
        "tokens per second",
    ]
    rows = []
    for name in SYSTEMS:
        own = record["systems"][name]
        seeds, models = own["seeds"], len(own["seeds"][0]["losses"])
        paper = PAPER_PERPLEXITY.get(name)
        took = [s["train"] for s in seeds]
        rows.append(
            [
                name,
                f"{_numbers([s['perplexity'] for s in seeds], '.2f')} ({'-' if paper is None else paper})",
                f"{own['parameters']:,}{' each' if models > 1 else ''}",
                f"{own['operations']:,.0f}",
                _numbers([s["wrong_source"] for s in seeds], "+.2f"),
                "; ".join(f"{kind} {_numbers(by, '.1f')}" for kind, by in _by_kind(seeds).items()),
                str(models),
                _numbers([t["steps"] for t in took], ",d"),
                _numbers([t["tokens"] for t in took], ",d"),
                _numbers([t["seconds"] for t in took], ".0f"),
                _numbers([t["tokens"] / t["seconds"] for t in took], ",.0f"),
            ]
        )
    return _table(head, rows)


def _by_kind(seeds: list[Record]) -> dict[str, list[float]]:
    """Return the mean BLEU over pairs of each kind of line, by seed."""
    every = [[pair["bleu_by_kind"] for pair in seed["pairs"].values()] for seed in seeds]
    return {kind: [fmean(own[kind] for own in pairs) for pairs in every] for kind in every[0][0]}


def _examples(record: Record) -> str:
    """Return a line of each kind of the test side by all three systems, in the first direction and seed."""
    own = {name: record["systems"][name]["seeds"][0]["pairs"] for name in SYSTEMS}
    pair = next(iter(own["MoE-Multi"]))
    shown = []
    for i, (given, wanted, _) in enumerate(own["MoE-Multi"][pair]["samples"]):
        written = [f"- {name}: {own[name][pair]['samples'][i][2]}" for name in SYSTEMS]
        shown.append("\n".join([f"- source: {given}", f"- reference: {wanted}", *written]))
    head = f"The first lines of the test sides, {pair.replace('-', ' to ')}, seed 0:"
    return "\n\n".join([head, *shown])


def translation_pictures(record: Record, work: Path) -> dict[str, Path]:
    """Draw what MoE-Multi gains on GNMT-Multi in every pair and return the picture by name."""
    seeds = {name: record["systems"][name]["seeds"] for name in SYSTEMS}
    rows = []
    for pair in seeds["MoE-Multi"][0]["pairs"]:
        both = zip(seeds["MoE-Multi"], seeds["GNMT-Multi"], strict=True)
        gains = [m["pairs"][pair]["bleu"] - d["pairs"][pair]["bleu"] for m, d in both]
        paper = PAPER_BLEU.get(pair)
        rows.append((pair.replace("-", " to "), gains, None if paper is None else paper[2] - paper[1]))
    path = work / "pairs.png"
    draw_rows(rows, "BLEU, MoE-Multi less GNMT-Multi: a dot per seed; grey, the paper's", path)
    return {"pairs": path}


def _numbers(values: list[Any], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
