"""sparsely_gated/translation: many pairs in one sparse model, in one dense model, and in a model each."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

from gatewright.backbones import count_cost, on_no_memory
from gatewright.data.hashing import digest
from gatewright.experiments.lab import Record, kept
from gatewright.experiments.translation_page import translation_page, translation_pictures
from gatewright.experiments.translation_runs import (
    DENSE,
    MOE,
    PLAN,
    SINGLE,
    Lines,
    TranslationPlan,
    open_lines,
    quick_form,
    run_model,
)
from gatewright.papers.sparsely_gated_mt import Settings, build
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

CLAIM = (
    "one sparse model of all pairs has a lower dev perplexity than the dense model of equal operations and "
    "its mean BLEU over the pairs is above that model's and above that of a model for each pair, in every "
    "seed; all three train with equal computation"
)


def run_translation(
    work: Path, quick: bool, plan: TranslationPlan = PLAN
) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its picture; finished models are kept in `work`, and one that was
    stopped goes on from its checkpoint.
    """
    plan = quick_form(plan) if quick else plan
    work.mkdir(parents=True, exist_ok=True)
    with Progress("sparsely_gated/translation") as progress:
        lines = open_lines(plan, progress.say)
        systems = _systems(plan, lines, work, progress)
    parts = {part: len(own["en"]) for part, own in lines.parts.items()}
    record: Record = {
        "schema": "gatewright.translation.v1",
        "target": "sparsely_gated/translation",
        "claim": CLAIM,
        "quick": quick,
        "plan": json.loads(json.dumps(asdict(plan))),
        "data": {"lines": parts, "pieces": lines.tokenizer.vocab_size},
        "systems": systems,
    }
    record |= {"environment": environment("cpu"), "created": now(), "verdict": verdict(record)}
    return record, translation_page(record), translation_pictures(record, work)


def _systems(plan: TranslationPlan, lines: Lines, work: Path, progress: Progress) -> Record:
    """Return every system's size and, by seed, what it came to."""
    text = [ids.tolist() for own in lines.parts.values() for line in own.values() for ids in line]
    about = {"plan": _shared(plan), "ids": sum(map(len, text)), "pieces": lines.tokenizer.vocab_size}
    jobs = [
        (system, seed, directions)
        for seed in plan.seeds
        for system in (MOE, DENSE, SINGLE)
        for directions in ([plan.directions] if system != SINGLE else [(d,) for d in plan.directions])
    ]
    found: Record = {}
    for place, (system, seed, directions) in enumerate(jobs):
        pair = "-".join(directions[0]) if len(directions) == 1 else "all"
        name = f"{system}-{pair}-{seed}"

        def show(share: float, place: int = place, name: str = name) -> None:
            progress.update((place + share) / len(jobs), f"{name} ({place + 1} of {len(jobs)})")

        show(0.0)
        settings = plan.settings(system, lines.tokenizer.vocab_size)
        keys = {**about, "model": asdict(settings), "seed": seed, "pair": pair}
        # Another plan in the same place must not go on from these checkpoints.
        folder = work / f"{name}-{digest([json.dumps(keys)])[:8]}"
        train = partial(run_model, plan, settings, lines, directions, seed, folder, show)
        own = kept(work / f"{name}.json", keys, train)
        runs = found.setdefault(system, {**_facts(settings), "seeds": {}})["seeds"]
        runs.setdefault(str(seed), []).append(own)
    for system in found.values():
        system["seeds"] = [_joined(int(seed), runs) for seed, runs in system["seeds"].items()]
    return found


def _shared(plan: TranslationPlan) -> Record:
    """Return what a finished model depends on: the plan without the seeds that are asked for."""
    return {k: v for k, v in json.loads(json.dumps(asdict(plan))).items() if k != "seeds"}


def _facts(settings: Settings) -> Record:
    with on_no_memory():
        cost = count_cost(build(settings), settings.target_context)
    return {
        "parameters": cost.total_parameters,
        "operations": cost.forward_flops_per_token / 2,
        "settings": asdict(settings),
    }


def _joined(seed: int, runs: list[Record]) -> Record:
    """Return one seed of a system, of one model or of several, as one."""
    pairs = {name: own for run in runs for name, own in run["pairs"].items()}
    nats = sum(own["dev_nats"] for own in pairs.values())
    tokens = sum(own["dev_tokens"] for own in pairs.values())
    train = {key: sum(run["train"][key] for run in runs) for key in ("steps", "tokens", "seconds")}
    return {
        "seed": seed,
        "perplexity": math.exp(nats / tokens),
        "wrong_source": (sum(own["wrong_source_nats"] for own in pairs.values()) - nats) / tokens,
        "mean_bleu": statistics.fmean(own["bleu"] for own in pairs.values()),
        "train": train,
        "decoding_seconds": sum(own["seconds"] for own in pairs.values()),
        "losses": [run["train"]["curve"][-1]["loss"] for run in runs],
        "pairs": pairs,
    }


def verdict(record: Record) -> Record:
    """Return whether the claim held in every seed, and how many pairs were won."""
    own = {name: system["seeds"] for name, system in record["systems"].items()}
    by_seed = list(zip(own[MOE], own[DENSE], own[SINGLE], strict=True))
    goals = {
        "dev perplexity below the dense model's": all(
            m["perplexity"] < d["perplexity"] for m, d, _ in by_seed
        ),
        "mean BLEU above the dense model's": all(m["mean_bleu"] > d["mean_bleu"] for m, d, _ in by_seed),
        "mean BLEU above that of a model for each pair": all(
            m["mean_bleu"] > s["mean_bleu"] for m, _, s in by_seed
        ),
    }
    won = {
        name: [sum(one["pairs"][pair]["bleu"] > o["pairs"][pair]["bleu"] for pair in one["pairs"])
               for one, o in zip(own[MOE], own[name], strict=True)]
        for name in (DENSE, SINGLE)
    }  # fmt: skip
    means = {
        name: (
            statistics.fmean(s["perplexity"] for s in seeds),
            statistics.fmean(s["mean_bleu"] for s in seeds),
        )
        for name, seeds in own.items()
    }
    held, count = all(goals.values()), len(own[MOE][0]["pairs"])
    more, ahead = (" and ".join(map(str, won[name])) for name in (DENSE, SINGLE))
    return {
        "held": held,
        "goals": goals,
        "won": won,
        "sentence": f"{'held' if held else 'did not hold'}: "
        + ", ".join(f"{name} dev perplexity {p:.2f} and mean BLEU {b:.2f}" for name, (p, b) in means.items())
        + f"; of {count} pairs {MOE} is ahead of {DENSE} in {more}, of {SINGLE} in {ahead}, by seed",
    }
