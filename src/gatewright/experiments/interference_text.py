"""The modern half of local_experts/interference: a small decoder learns one domain, then another joins it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gatewright.data import Corpus, TokenStream, open_corpus
from gatewright.evaluation import bits_per_byte, take_bytes
from gatewright.experiments.lab import Arm, Plan, build, kept
from gatewright.experiments.steps import Stepper
from gatewright.training.runlog import Progress

Record = dict[str, Any]

# Equal active FLOPs: 2 of 16 experts of width 128 against one layer of 256 and the router's 16 logits.
ARMS = (
    Arm("sparse", num_experts=16, num_selected=2, expert_width=128, losses={"balance": 0.01}),
    Arm("dense", router=None, expert_width=261),
)


@dataclass(frozen=True)
class TextPlan:
    """What is run: `steps` on the first domain alone, then as many with the second beside it, its rows added
    to those of the first. Each side takes the best of `rates` for the first domain alone, seed 0.
    """

    orders: tuple[tuple[str, str], ...] = (("scripture", "code"), ("code", "scripture"))
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    steps: int = 384
    every: int = 32
    rows: int = 12
    eval_bytes: int = 32_768


class Joined:
    """Batches of one domain up to a step, then of both: the first domain's rows are the same either way."""

    def __init__(self, first: TokenStream, second: TokenStream, switch: int | None) -> None:
        self.first, self.second, self.switch = first, second, switch

    def batch(self, step: int) -> np.ndarray:
        """Return [rows, context + 1] ids, twice the rows from the switch on."""
        own = self.first.batch(step)
        if self.switch is None or step < self.switch:
            return own
        return np.concatenate([own, self.second.batch(step - self.switch)])


def domain_tokens(corpus: Corpus, domain: str) -> np.ndarray:
    """Return the training tokens of one domain, in the stream's order."""
    number = corpus.domains.index(domain)
    of_document = corpus.text_store().table[corpus.train_documents(), 2]
    ends = corpus.train_ends()
    starts = np.concatenate([[0], ends[:-1]])
    own = of_document == number
    tokens = corpus.train_ids()
    return np.concatenate([tokens[a:b] for a, b in zip(starts[own], ends[own], strict=True)])


def run_text(plan: TextPlan, work: Path) -> Record:
    """Return {"rates": {order: {side: {rate: bits per byte}}}, "runs": {order: {side: one per seed}}}."""
    work.mkdir(parents=True, exist_ok=True)
    rates: Record = {}
    runs: Record = {}
    sides = [(order, arm) for order in plan.orders for arm in ARMS]
    with Progress("local_experts/interference") as progress:
        corpus = open_corpus((), progress=progress.say)
        streams = {d: domain_tokens(corpus, d) for d in {d for order in plan.orders for d in order}}
        total = len(sides) * (len(plan.rates) + 3 * len(plan.seeds))
        done = 0
        for order, arm in sides:
            name = " then ".join(order)
            found = {}
            for rate in plan.rates:
                progress.update(done / total, f"{name}: {arm.name} at rate {rate:g}")
                job = partial(_train, plan, arm, corpus, streams, order, 0, rate, None, plan.steps)
                found[f"{rate:g}"] = _kept(plan, work, corpus, arm, order, 0, rate, "search", job)["end"]
                done += 1
            rates.setdefault(name, {})[arm.name] = found
            best = float(min(found, key=lambda rate: found[rate]))
            runs.setdefault(name, {})[arm.name] = own = []
            for seed in plan.seeds:
                progress.update(done / total, f"{name}: {arm.name}, seed {seed}")
                one: Record = {"seed": seed, "rate": best}
                for kind, switch in (("joined", plan.steps), ("stayed", None)):
                    job = partial(
                        _train, plan, arm, corpus, streams, order, seed, best, switch, 2 * plan.steps
                    )
                    one[kind] = _kept(plan, work, corpus, arm, order, seed, best, kind, job)
                own.append(one)
                done += 3
    return {"rates": rates, "runs": runs}


def _kept(
    plan: TextPlan,
    work: Path,
    corpus: Corpus,
    arm: Arm,
    order: tuple[str, str],
    seed: int,
    rate: float,
    kind: str,
    job: Any,
) -> Record:
    settings: Record = {"plan": dataclasses.asdict(plan), "arm": dataclasses.asdict(arm)}
    settings |= {"order": list(order), "seed": seed, "rate": rate, "kind": kind, "text": corpus.fingerprint}
    path = work / f"{'-'.join(order)}-{arm.name}-{kind}-{seed}-{rate:g}.json"
    return kept(path, settings, job)


def _train(
    plan: TextPlan,
    arm: Arm,
    corpus: Corpus,
    streams: Mapping[str, np.ndarray],
    order: tuple[str, str],
    seed: int,
    rate: float,
    switch: int | None,
    steps: int,
) -> Record:
    """Return the bits per byte on the first domain's held-out text: at the switch, on the way, at the end."""
    # Both halves lie on one schedule of twice the steps, so that staying and joining differ in text alone.
    shared = Plan((arm,), arm.name, rows=plan.rows, steps=2 * plan.steps, learning_rate=rate)
    model = build(shared, arm, corpus.tokenizer.vocab_size, seed)
    first, second = (TokenStream(streams[d], plan.rows, shared.context, seed=0) for d in order)
    stepper = Stepper(model, Joined(first, second, switch), shared, arm.losses, seed)
    lengths = corpus.tokenizer.byte_lengths
    text = {order[0]: take_bytes(corpus.valid(order[0]).tokens, lengths, plan.eval_bytes)}

    def bits() -> float:
        found = bits_per_byte(model, text, lengths, context=shared.context, batch_size=plan.rows)
        return found.bits_per_byte

    path = []
    for step in range(steps):
        if step >= plan.steps and step % plan.every == 0:
            path.append([step, bits()])
        stepper.advance()
    end = bits()
    return {"path": [*path, [steps, end]], "switch": path[0][1] if path else end, "end": end}


def judge_text(runs: Record) -> Record:
    """Return whether the sparse side's cost of the second domain is below the dense side's in every seed."""
    found = []
    for sides in runs.values():
        for sparse, dense in zip(sides["sparse"], sides["dense"], strict=True):
            found.append(cost(sparse) < cost(dense))
    return {
        "held": all(found),
        "sentence": f"text: the second domain costs the sparse decoder less in {sum(found)} of {len(found)} "
        "runs",
    }


def cost(run: Record) -> float:
    """Return bits per byte on the first domain with the second beside it, over those of staying alone."""
    return float(run["joined"]["end"] - run["stayed"]["end"])


def setback(run: Record) -> float:
    """Return how far the bits per byte on the first domain rose above those at the switch."""
    return float(max(value for _, value in run["joined"]["path"]) - run["joined"]["switch"])
