"""gshard/quality: ten languages into English for experts x depth, against dense and bilingual models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from gatewright.backbones import count_cost, on_no_memory
from gatewright.data.hashing import digest
from gatewright.data.translations import Direction
from gatewright.evaluation.bleu import bleu
from gatewright.experiments.gshard_page import quality_page, quality_pictures
from gatewright.experiments.gshard_runs import (
    BILINGUAL,
    MANY,
    PLAN,
    SPARSE,
    TWIN,
    QualityPlan,
    System,
    quick_form,
    run_model,
)
from gatewright.experiments.gshard_text import Corpus, many_to_many, many_to_one, open_sources, split_texts
from gatewright.experiments.lab import Record, kept
from gatewright.papers.gshard import Settings, build
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

CLAIM = (
    "ten languages into English: the sparse model is no worse than its dense twin of equal operations in any "
    "language and better in most, in cross-entropy and in BLEU, means over the seeds"
)
Job = tuple[System, int, tuple[Direction, ...], float]


def run_quality(work: Path, quick: bool, plan: QualityPlan = PLAN) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; finished models are kept in `work`, and one that was
    stopped goes on from its checkpoint.
    """
    plan = quick_form(plan) if quick else plan
    work.mkdir(parents=True, exist_ok=True)
    bleu(["one"], ["one"])  # where its package is missing, this says so before anything is trained
    with Progress("gshard/quality") as progress:
        sources = open_sources(plan.text, progress.say)
        progress.update(0.0, "splitting the text, learning pieces")
        texts = split_texts(plan.text, sources.lines)
        corpora = many_to_one(plan.text, texts), many_to_many(plan.text, texts)
        systems = _systems(plan, corpora, work, progress)
    record: Record = {
        "schema": "gatewright.gshard_quality.v1",
        "target": "gshard/quality",
        "claim": CLAIM,
        "quick": quick,
        "plan": json.loads(json.dumps(asdict(plan))),
        "data": {"missing": sources.missing, "pairs": _pairs(plan, corpora[0]), "text": _print_of(corpora)},
        "systems": systems,
    }
    record["tokens_to"] = tokens_table(record)
    record |= {"verdict": verdict(record), "environment": environment("cpu"), "created": now()}
    return record, quality_page(record), quality_pictures(record, work)


def _pairs(plan: QualityPlan, corpus: Corpus) -> Record:
    """Return how many pairs each part has, by language."""
    return {
        part: {
            source: sum(bool(len(a) and len(b)) for a, b in zip(own[source], own[target], strict=True))
            for source, target in plan.text.into_english
        }
        for part, own in corpus.parts.items()
    }


def _print_of(corpora: Sequence[Corpus]) -> str:
    """Return what tells these texts in ids from others."""
    parts = (own for corpus in corpora for own in corpus.parts.values())
    return digest(ids.tobytes() for own in parts for lines in own.values() for ids in lines)


def jobs_of(plan: QualityPlan) -> list[Job]:
    """Return every model that is trained: system, seed, directions, and its share of the steps."""
    found: list[Job] = []
    into = plan.text.into_english
    for place, seed in enumerate(plan.seeds):
        for system in plan.systems:
            if place and system.name not in plan.seeded:
                continue
            if system.name == BILINGUAL:
                found += [(system, seed, (direction,), 1 / len(into)) for direction in into]
            else:
                found.append((system, seed, plan.text.seen if system.name == MANY else into, 1.0))
    return found


def _systems(plan: QualityPlan, corpora: tuple[Corpus, Corpus], work: Path, progress: Progress) -> Record:
    """Return every system's size and, by seed, what it came to."""
    jobs = jobs_of(plan)
    weights = [share * system.num_layers for system, _, _, share in jobs]
    text, found = _print_of(corpora), dict[str, Any]()
    for place, (system, seed, directions, share) in enumerate(jobs):
        corpus = corpora[system.name == MANY]
        pair = "-".join(directions[0]) if len(directions) == 1 else "all"
        name = f"{system.name}-{pair}-{seed}".replace(" ", "").replace("/", "-")

        def show(part: float, place: int = place, name: str = name) -> None:
            done = sum(weights[:place]) + part * weights[place]
            progress.update(done / sum(weights), f"{name} ({place + 1} of {len(jobs)})")

        show(0.0)
        own_plan = plan if system.learning_rate is None else replace(plan, learning_rate=system.learning_rate)
        settings = plan.settings(system, corpus)
        asked = (*directions, *plan.text.unseen) if system.name == MANY else directions
        keys = {
            "plan": _shared(own_plan),
            "text": text,
            "model": asdict(settings),
            "seed": seed,
            "pair": pair,
        }
        # A checkpoint of other settings is none to go on from.
        folder = work / f"{name}-{digest([json.dumps(keys)])[:8]}"
        run = partial(run_model, own_plan, settings, corpus, directions, asked, seed, folder, show, share)
        own = kept(work / f"{name}.json", keys, run)
        runs = found.setdefault(system.name, {**_facts(plan, settings), "seeds": {}})["seeds"]
        runs.setdefault(seed, []).append(own)
    for own in found.values():
        own["seeds"] = [_joined(runs) for runs in own["seeds"].values()]
    return found


def _shared(plan: QualityPlan) -> Record:
    """Return what a model follows from, as plain data."""
    told: Record = json.loads(json.dumps(asdict(plan)))
    return {k: v for k, v in told.items() if k not in ("seeds", "seeded", "systems", "levels")}


def _facts(plan: QualityPlan, settings: Settings) -> Record:
    """Return a model's parameters and its operations per token of a pair of the settings' lengths."""
    with on_no_memory():
        cost = count_cost(build(settings), plan.text.longest)
    return {"parameters": cost.total_parameters, "operations": cost.forward_flops_per_token / 2}


def _joined(runs: list[Record]) -> Record:
    """Return one seed of a system, of one model or of a model for each language, as one."""
    train: Record = {key: sum(run["train"][key] for run in runs) for key in ("steps", "tokens", "seconds")}
    train |= {"models": len(runs), "curve": runs[0]["train"]["curve"] if len(runs) == 1 else []}
    return {
        "seed": runs[0]["seed"],
        "train": train,
        "directions": {name: own for run in runs for name, own in run["directions"].items()},
    }


def tokens_to(curve: Sequence[Any], level: float) -> float | None:
    """Return after how many tokens of training the dev loss was first at `level`: on the straight line
    between the first point at or below it and the one before. None where it never was.
    """
    before: Any = None
    for point in curve:
        if point["dev"] <= level:
            if before is None:
                return float(point["tokens"])
            part = (before["dev"] - level) / (before["dev"] - point["dev"])
            return float(before["tokens"] + part * (point["tokens"] - before["tokens"]))
        before = point
    return None


def tokens_table(record: Record) -> Record:
    """Return tokens of training by system, level and seed, as table 2 has them."""
    return {
        name: {f"{level:g}": [tokens_to(seed["train"]["curve"], level) for seed in own["seeds"]]
               for level in record["plan"]["levels"]}
        for name, own in record["systems"].items()
        if name not in (BILINGUAL, MANY)
    }  # fmt: skip


def per_token(own: Record, key: str = "nats") -> float:
    """Return nats per token of what one direction came to."""
    return float(own[key] / own["tokens"])


def compared(record: Record, first: str, second: str) -> Record:
    """Return by language what two systems came to, means over their seeds: BLEU and nats per token, and the
    spread of BLEU over the seeds of the one that has more of it.
    """
    found: Record = {}
    for language in record["plan"]["text"]["languages"]:
        own: Record = {}
        spread = 0.0
        for side, name in (("first", first), ("second", second)):
            seeds = [one["directions"][f"{language}-en"] for one in record["systems"][name]["seeds"]]
            bleu = [one["bleu"] for one in seeds]
            spread = max(spread, max(bleu) - min(bleu))
            own[side] = {"bleu": statistics.fmean(bleu), "nats": statistics.fmean(map(per_token, seeds))}
        found[language] = {**own, "spread": spread}
    return found


def verdict(record: Record) -> Record:
    """Return whether the claim held; "no worse" in BLEU allows for the spread over the seeds, in
    cross-entropy for nothing, and "most" is more than half of the languages.
    """
    own = compared(record, SPARSE, TWIN)
    count = len(own)
    more = [name for name, o in own.items() if o["first"]["bleu"] > o["second"]["bleu"]]
    worse = [name for name, o in own.items() if o["first"]["bleu"] < o["second"]["bleu"] - o["spread"]]
    lower = [name for name, o in own.items() if o["first"]["nats"] < o["second"]["nats"]]
    higher = [name for name, o in own.items() if o["first"]["nats"] > o["second"]["nats"]]
    goals = {
        "cross-entropy higher than the dense twin's in no language": not higher,
        "cross-entropy lower in most languages": 2 * len(lower) > count,
        "BLEU lower than the dense twin's by more than the spread over the seeds in no language": not worse,
        "BLEU higher in most languages": 2 * len(more) > count,
    }
    held = all(goals.values())
    means = {side: statistics.fmean(o[side]["bleu"] for o in own.values()) for side in ("first", "second")}
    runs = [one for seed in record["systems"][SPARSE]["seeds"] for one in seed["directions"].values()]
    wrong = statistics.fmean(per_token(one, "wrong_nats") - per_token(one) for one in runs)
    control = statistics.fmean(one["control_bleu"] for one in runs)
    return {
        "held": held,
        "goals": goals,
        "more": more,
        "worse": worse,
        "lower": lower,
        "higher": higher,
        "wrong_source_costs": wrong,
        "sentence": f"{'held' if held else 'did not hold'}: {SPARSE} against {TWIN}, cross-entropy lower in "
        f"{len(lower)} of {count} languages and higher in {len(higher)}, BLEU higher in {len(more)} and "
        f"lower beyond the seeds' spread in {len(worse)}; mean BLEU {means['first']:.2f} against "
        f"{means['second']:.2f} ({control:.2f} for another line's translation); another line's source costs "
        f"{wrong:+.2f} nats per token",
    }
