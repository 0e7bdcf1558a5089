"""sparsely_gated/table9: the inputs on which single experts fire most strongly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gatewright.backbones import LSTMDecoder
from gatewright.data import Corpus, Tokenizer, open_corpus
from gatewright.experiments.gated import GatedPlan, Model, fit, held_out, shared, windows
from gatewright.experiments.gated_pages import table9_page
from gatewright.experiments.lab import Record, kept
from gatewright.inspection import capture_routing
from gatewright.inspection.plots.rows import draw_rows
from gatewright.papers.sparsely_gated import Settings
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

_MODEL = Model("MoE-64", Settings(width=64, expert_width=128, num_experts=64, dropout=0.0))


@dataclass(frozen=True)
class ExpertsPlan(GatedPlan):
    """One model, and of each expert the `strongest` inputs; `shown` experts with `contexts` of each."""

    models: tuple[Model, ...] = (_MODEL,)
    strongest: int = 50
    shown: int = 3
    contexts: int = 8


PLAN = ExpertsPlan()
CLAIM = (
    "experts specialise: in every seed, for at least three of 64 experts, at least half of the fifty inputs "
    "with the largest gate weight are one and the same token"
)


def run_table9(work: Path, quick: bool, plan: ExpertsPlan = PLAN) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its picture; quick: one seed, a quarter of the steps."""
    if quick:
        plan = replace(
            plan, seeds=plan.seeds[:1], steps=max(plan.steps // 4, 1), warmup_steps=plan.warmup_steps // 2
        )
    work.mkdir(parents=True, exist_ok=True)
    seeds = []
    with Progress("sparsely_gated/table9") as progress:
        corpus = open_corpus((), tokenizer=plan.tokenizer, progress=progress.say)
        for place, seed in enumerate(plan.seeds):

            def show(share: float, place: int = place) -> None:
                progress.update((place + share) / len(plan.seeds), f"seed {plan.seeds[place]}")

            show(0.0)
            settings = asdict(plan.settings(plan.models[0], corpus.tokenizer.vocab_size))
            about = {"model": settings, "seed": seed, "plan": shared(plan), "text": corpus.fingerprint}
            seeds.append(kept(work / f"{seed}.json", about, partial(_seed, plan, corpus, seed, show)))
    record: Record = {
        "schema": "gatewright.gated.v1",
        "target": "sparsely_gated/table9",
        "claim": CLAIM,
        "quick": quick,
        "plan": shared(plan),
        "data": {"text": corpus.fingerprint},
        "seeds": seeds,
        "environment": environment("cpu"),
        "created": now(),
    }
    record["verdict"] = verdict9(record)
    path = work / "rows.png"
    best = seeds[0]["experts"][:16]
    drawn = [(f"expert {own['expert']}: {own['token']}", [own["purity"]], own["token_share"]) for own in best]
    draw_rows(drawn, "share of the commonest token: strongest inputs; grey, all text", path)
    return record, table9_page(record), {"rows": path}


def _seed(plan: ExpertsPlan, corpus: Corpus, seed: int, show: Any) -> Record:
    net, record = fit(plan, plan.models[0], corpus, seed, show)
    if "diverged_at" in record:
        return {"seed": seed, **record, "experts": []}
    experts = specialists(net, held_out(corpus, plan.eval_bytes, 1), corpus.tokenizer, plan)
    return json.loads(json.dumps({"seed": seed, **record, "experts": experts}))


def specialists(
    net: LSTMDecoder, texts: Mapping[str, np.ndarray], tokenizer: Tokenizer, plan: ExpertsPlan
) -> list[Record]:
    """Return a record for each expert with at least half an even load, the purest first.

    `purity`: the share of the commonest token among the `strongest` inputs, sorted by gate weight (the
    earlier first among equals), without noise; `token_share`: that token's share of all text.
    """
    ids, weights, experts = _routed(net, texts, plan)
    flat, count = ids.reshape(-1), int(experts.max()) + 1
    count = max(count, next(iter(net.routers().values())).weight.shape[0])
    common = np.bincount(flat, minlength=tokenizer.vocab_size) / len(flat)
    load = np.bincount(experts.reshape(-1), minlength=count) / experts.size
    found = []
    for expert in np.flatnonzero(load >= 0.5 / count).tolist():
        own = np.where(experts == expert, weights, 0).max(axis=1)
        order = np.argsort(-own, kind="stable")[: plan.strongest]
        order = order[own[order] > 0]
        counts = np.bincount(flat[order], minlength=len(common))
        token = int(counts.argmax())
        found.append(
            {
                "expert": expert,
                "load_share": float(load[expert]),
                # What a Markdown table would break on is written as it is typed.
                "token": tokenizer.pieces([token])[0].replace("\n", "\\n").replace("|", "\\|"),
                "purity": float(counts[token] / len(order)),
                "token_share": float(common[token]),
                "contexts": _contexts(ids, order, tokenizer, plan.contexts),
            }
        )
    return sorted(found, key=lambda own: (-own["purity"], own["expert"]))


def _routed(
    net: LSTMDecoder, texts: Mapping[str, np.ndarray], plan: GatedPlan
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids [N, S], and of every token its weights and experts [N S, K]."""
    ids, weights, experts = [], [], []
    for batch in windows(texts, plan):
        (found,) = capture_routing(net, batch).values()
        ids.append(batch.numpy())
        weights.append(found.weights.numpy())
        experts.append(found.experts.numpy())
    return np.concatenate(ids), np.concatenate(weights), np.concatenate(experts)


def _contexts(ids: np.ndarray, order: np.ndarray, tokenizer: Tokenizer, most: int) -> list[str]:
    """Return the first `most` different contexts, on one line each, with their token in brackets."""
    lines: dict[str, None] = {}
    for place in order.tolist():
        row, column = divmod(place, ids.shape[1])
        start = max(0, column - 6)
        parts = (ids[row, start:column], ids[row, column : column + 1], ids[row, column + 1 : column + 5])
        before, token, after = (" ".join(tokenizer.decode(part).split(" ")) for part in parts)
        lines[" ".join(f"{before}[{token}]{after}".split())] = None
        if len(lines) == most:
            break
    return list(lines)


def verdict9(record: Record) -> Record:
    """Return how many experts are that pure, by seed."""
    pure = [sum(own["purity"] >= 0.5 for own in seed["experts"]) for seed in record["seeds"]]
    best = [
        f"{own['token']!r} {100 * own['purity']:.0f} %"
        for seed in record["seeds"]
        for own in seed["experts"][:3]
    ]
    held = min(pure) >= 3
    return {
        "held": held,
        "pure_experts": pure,
        "sentence": f"{'held' if held else 'did not hold'}: {', '.join(map(str, pure))} experts whose "
        f"strongest inputs are at least half one token; the purest: {', '.join(best)}",
    }
