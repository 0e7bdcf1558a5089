"""switch/tuning-rates: the fine-tunings of tables 4 and 8 at four learning rates, on every task."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

from gatewright.experiments.finetune_runs import Plan, quick_form, run_plan
from gatewright.experiments.finetune_tables import DENSE, EVEN, EXPERT, TABLE4
from gatewright.experiments.lab import Record
from gatewright.experiments.rates import SEED, Result, swept
from gatewright.training.interrupt import stop_on_signals
from gatewright.training.runlog import Progress

TARGET, OF = "switch/tuning-rates", "switch/table4, switch/table8"
SIDES = (DENSE, EVEN, EXPERT)
# Half as high as those of training from new weights.
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SWEPT = replace(
    TABLE4,
    target=TARGET,
    seeds=(SEED,),
    sides=tuple(
        replace(side, name=f"{side.name} at {rate:g}", learning_rate=rate) for rate in RATES for side in SIDES
    ),
)


def run_tuning_rates(work: Path, quick: bool, plan: Plan = SWEPT) -> Result:
    """Return the record and its page: dev texts that are wrong; quick: fewer tokens, half of the steps."""
    plan = quick_form(plan) if quick else plan
    with Progress(TARGET) as progress, stop_on_signals() as stop:

        def say(share: float, state: str) -> None:
            progress.update(share, state)

        record = run_plan(plan, work, say, stop)
    found: dict[str, list[Record]] = {side.name: [] for side in SIDES}
    for side in SIDES:
        for rate in RATES:
            tasks = record["sides"][f"{side.name} at {rate:g}"].values()
            own = _dev([run["dev"] for seeds in tasks for run in seeds])
            found[side.name].append({"learning_rate": rate, **own})
    told = {
        "measure": "dev_error",
        "course": f"{plan.steps} steps of {plan.rows} texts of each of {len(plan.tasks)} tasks",
        "plan": plan.to_dict(),
        "pretrained": record["pretrained"],
        "data": {"tasks": record["tasks"]},
    }
    return swept(TARGET, OF, TABLE4.learning_rate, found, quick, told)


def _dev(own: list[Record]) -> Record:
    """Return dev texts that are wrong in per cent and nats of the right answers, means over tasks."""
    nats = statistics.fmean(one["nats"] for one in own)
    wrong = 100 * (1 - statistics.fmean(one["accuracy"] for one in own))
    return {"dev_error": wrong if math.isfinite(nats) else None, "nats": nats}
