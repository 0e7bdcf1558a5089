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
from gatewright.papers.mixtral import Settings

Record = dict[str, Any]


@dataclass(frozen=True)
class RacePlan:
    """A race to be reproduced: its settings, the rates swept, and the share of the tokens on which they
    are swept.
    """

    name: str
    race: RaceRun
    rates: tuple[float, ...]
    sweep_share: float
    claim: str


QUICKSTART = RacePlan(
    name="race/quickstart",
    race=RaceRun(seeds=3),
    rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    sweep_share=1.0,
    claim="a sparse model annealed on 60 % of the tokens is at or below its dense twin annealed on 100 %, "
    "by more than the spread of seeds",
)

HOUR = RacePlan(
    name="race/hour",
    race=RaceRun(
        model=Settings(width=128, num_layers=3, num_heads=4, num_kv_heads=4, expert_width=128),
        tokens=36_000 * 1024,
        fraction=0.5,
        warmup_steps=200,
        evaluations=20,
    ),
    rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
    sweep_share=0.06,
    claim="over about an hour on two cores, a sparse model annealed on 50 % of the tokens reaches its dense "
    "twin annealed on 100 %",
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
    swept = sweep(
        dataclasses.replace(base, tokens=round(base.tokens * plan.sweep_share), seeds=1),
        plan.rates,
        work / "sweep.json",
    )
    rates = {kind: best_rate(swept["entries"], kind) for kind in ("dense", "sparse")}
    full = dataclasses.replace(
        base, dense_rate=rates["dense"], sparse_rate=rates["sparse"], out=str(work / "race"), resume=True
    )
    return {"claim": plan.claim, "sweep": swept, "race": race(full).record}
