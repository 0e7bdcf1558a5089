"""race/quickstart and race/hour: the main claim, with tuned rates on both sides and every seed shown.

Each reproduction sweeps the same learning rates for both sides, takes the best of each, and races seeds 0, 1,
2 (the hour: seed 0). What is expected stands in reproductions/expected.toml, written before the first full
run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewright.experiments.race import race
from gatewright.experiments.race_run import RaceRun
from gatewright.experiments.sweep import best_rate, sweep

Record = dict[str, Any]


@dataclass(frozen=True)
class RacePlan:
    """A race to be reproduced: its settings, and the learning rates that are swept for both sides.

    `sweep_of`: another plan of the same two models, whose sweep serves this one too.
    """

    name: str
    race: RaceRun
    claim: str
    rates: tuple[float, ...] = ()
    sweep_of: RacePlan | None = None


QUICKSTART = RacePlan(
    name="race/quickstart",
    race=RaceRun(seeds=3),
    rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
    claim="a sparse model annealed on 60 % of the tokens is at or below its dense twin annealed on 100 %, "
    "by more than the spread of seeds",
)

HOUR = RacePlan(
    name="race/hour",
    race=RaceRun(tokens=8 * 8_192_000, fraction=0.5, evaluations=24, threads=1),
    sweep_of=QUICKSTART,
    claim="the quickstart's two models over eight times its tokens, about an hour on one core: a sparse "
    "model annealed on 50 % of the tokens is at or below its dense twin annealed on 100 %",
)

PLANS = {plan.name: plan for plan in (QUICKSTART, HOUR)}


def run_plan(plan: RacePlan, work: Path, quick: bool) -> Record:
    """Return {"sweep", "race", "claim"}. Full: sweep, then race with the best rates. Quick: an eighth of the
    tokens, recorded rates, seed 0.

    Whatever is finished below `work` is kept, so that a stopped reproduction goes on where it was.
    """
    base = plan.race
    if quick:
        short = dataclasses.replace(
            base,
            tokens=base.tokens // 8,
            seeds=1,
            out=str(work / "race"),
            resume=True,
            warmup_steps=50,
            evaluations=6,
        )
        return {"claim": plan.claim, "sweep": None, "race": race(short).record}
    tuned = plan.sweep_of or plan
    folder = work if tuned is plan else work.parent / tuned.name.replace("/", "-")
    swept = sweep(dataclasses.replace(tuned.race, seeds=1), tuned.rates, folder / "sweep.json")
    rates = {kind: best_rate(swept["entries"], kind) for kind in ("dense", "sparse")}
    full = dataclasses.replace(
        base, dense_rate=rates["dense"], sparse_rate=rates["sparse"], out=str(work / "race"), resume=True
    )
    return {"claim": plan.claim, "sweep": swept, "race": race(full).record}
