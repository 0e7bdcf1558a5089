"""switch/text-rates and switch/tuning-rates: the two models of tables 4 and 8 on text, and their fine-tunings
on every task, at five and six learning rates.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

from gatewright.data import open_corpus
from gatewright.experiments.finetune_runs import Bench, Plan, quick_form, run_plan
from gatewright.experiments.finetune_tables import DENSE, EVEN, EXPERT, TABLE4
from gatewright.experiments.lab import Record
from gatewright.experiments.rates import SEED, Result, rates_of, swept
from gatewright.training.interrupt import stop_on_signals
from gatewright.training.run import TrainRun
from gatewright.training.runlog import Progress

TEXT_TARGET, TARGET, OF = "switch/text-rates", "switch/tuning-rates", "switch/table4, switch/table8"
KINDS = {"dense": False, "Switch": True}
# What both sides had before any sweep.
TEXT_SHARED, SHARED = 3e-3, 2e-3
SIDES = {"dense": DENSE, "Switch": EVEN, "Switch with 0.4 in its experts": EXPERT}
# With the first four every side had its best at the end of the list.
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SWEPT = replace(
    TABLE4,
    target=TARGET,
    seeds=(SEED,),
    learning_rate=SHARED,
    sides=tuple(
        replace(side, name=f"{side.name} at {rate:g}", learning_rate=rate)
        for rate in RATES
        for side in SIDES.values()
    ),
)


class _Texts(Bench):
    """The models of a plan with the sweep's seed."""

    def run(self, sparse: bool) -> TrainRun:
        return replace(super().run(sparse), seed=SEED)


def run_text_rates(work: Path, quick: bool, whole: Plan = TABLE4) -> Result:
    """Return the record and its page: both models on text; quick: a quarter of the tokens."""
    plan = quick_form(whole) if quick else whole
    found: dict[str, list[Record]] = {name: [] for name in KINDS}
    jobs = [(rate, name) for rate in rates_of(TEXT_TARGET) for name in KINDS]
    with Progress(TEXT_TARGET) as progress, stop_on_signals() as stop:
        corpus = open_corpus(plan.data, tokenizer=plan.tokenizer, progress=progress.say)
        for place, (rate, name) in enumerate(jobs):

            def show(share: float, state: str, place: int = place) -> None:
                progress.update((place + share) / len(jobs), f"model {place + 1} of {len(jobs)}: {state}")

            folder = work / f"{rate:g}"
            folder.mkdir(parents=True, exist_ok=True)
            bench = _Texts(replace(plan, pretraining_rate=rate), corpus, folder, stop)
            bits = bench.pretrained(KINDS[name], show)["bits_per_byte"]
            found[name].append({"learning_rate": rate, "valid_bpb": bits if math.isfinite(bits) else None})
    told = {
        "course": f"{plan.tokens:,} tokens of text in batches of {plan.batch_tokens:,}",
        "plan": course_of(plan),
        "data": {"text": corpus.fingerprint},
    }
    return swept(TEXT_TARGET, OF, TEXT_SHARED, found, quick, told)


def course_of(plan: Plan) -> Record:
    """Return what a sweep's runs share, as plain data: a plan without its sides and rates."""
    left = ("target", "sides", "seeds", "pretraining_rate", "dense_pretraining_rate", "learning_rate")
    told = plan.to_dict().items()
    course: Record = json.loads(json.dumps({k: v for k, v in told if k not in left}))
    return course


def run_tuning_rates(work: Path, quick: bool, plan: Plan = SWEPT) -> Result:
    """Return the record and its page: dev texts that are wrong; quick: fewer tokens, half of the steps,
    every other rate.
    """
    rates = RATES[::2] if quick else RATES
    if quick:
        few = tuple(side for side in plan.sides if side.learning_rate in rates)
        plan = replace(quick_form(plan), sides=few)
    with Progress(TARGET) as progress, stop_on_signals() as stop:

        def say(share: float, state: str) -> None:
            progress.update(share, state)

        record = run_plan(plan, work, say, stop)
    found: dict[str, list[Record]] = {name: [] for name in SIDES}
    for name, side in SIDES.items():
        for rate in rates:
            tasks = record["sides"][f"{side.name} at {rate:g}"].values()
            own = _dev([run["dev"] for seeds in tasks for run in seeds])
            found[name].append({"learning_rate": rate, **own})
    told = {
        "measure": "dev_error",
        "course": f"{plan.steps} steps of {plan.rows} texts of each of {len(plan.tasks)} tasks",
        "plan": course_of(plan),
        "pretrained": record["pretrained"],
        "data": {"tasks": record["tasks"]},
    }
    return swept(TARGET, OF, SHARED, found, quick, told)


def _dev(own: list[Record]) -> Record:
    """Return dev texts that are wrong in per cent and nats of the right answers, means over tasks."""
    nats = statistics.fmean(one["nats"] for one in own)
    wrong = 100 * (1 - statistics.fmean(one["accuracy"] for one in own))
    return {"dev_error": wrong if math.isfinite(nats) else None, "nats": nats}
