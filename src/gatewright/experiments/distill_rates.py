"""switch/distill-rates: dense model and teacher of table 6 at five learning rates each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from gatewright.data import open_corpus
from gatewright.experiments.distill_runs import Plan, SeedModels, _shared, quick_form
from gatewright.experiments.distill_tables import TABLE6
from gatewright.experiments.lab import Record
from gatewright.experiments.rates import SEED, Result, rates_of, swept
from gatewright.training.interrupt import stop_on_signals
from gatewright.training.runlog import Progress

TARGET, OF = "switch/distill-rates", "switch/table6"
DENSE, TEACHER = "dense", "64 experts"
SHARED = 6e-3  # what both had before the sweep


def run_distill_rates(work: Path, quick: bool, whole: Plan = TABLE6) -> Result:
    """Return the record and its page; quick: three eighths of the tokens, every other rate."""
    rates = rates_of(TARGET)[::2] if quick else rates_of(TARGET)
    plan = replace(quick_form(whole) if quick else whole, seeds=(SEED,), teacher_rate=None)
    sizes = {DENSE: None, TEACHER: replace(plan.model, num_experts=max(plan.num_experts))}
    found: dict[str, list[Record]] = {name: [] for name in sizes}
    jobs = [(rate, name) for rate in rates for name in sizes]
    with Progress(TARGET) as progress, stop_on_signals() as stop:
        corpus = open_corpus(plan.data, progress=progress.say)
        for place, (rate, name) in enumerate(jobs):

            def show(share: float, state: str, place: int = place, name: str = name) -> None:
                progress.update((place + share) / len(jobs), f"model {place + 1} of {len(jobs)}: {state}")

            folder = work / f"{rate:g}"
            folder.mkdir(parents=True, exist_ok=True)
            own = SeedModels(replace(plan, learning_rate=rate), SEED, corpus, folder, stop)
            make = partial(own.plain, sizes[name] or own.student)
            model = own.trained(name.replace(" ", "-"), {"rate": rate}, make, show)
            found[name].append({"learning_rate": rate, "valid_bpb": model["bits_per_byte"]})
    told = {
        "course": f"{plan.tokens:,} tokens in batches of {plan.batch_tokens:,}",
        "plan": course_of(plan),
        "data": {"text": corpus.fingerprint},
    }
    return swept(TARGET, OF, SHARED, found, quick, told)


def course_of(plan: Plan) -> Record:
    """Return what a sweep's runs share, as plain data: a plan without its rates."""
    return {
        key: value for key, value in _shared(plan).items() if key not in ("learning_rate", "teacher_rate")
    }
