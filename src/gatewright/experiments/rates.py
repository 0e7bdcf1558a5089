"""switch/rates and olmoe/rates: what the learning rate that an experiment's arms share does to their order.

Arms of an experiment at four rates each, with a seed that no experiment has: the dense model gets as many
runs as every sparse one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gatewright.data import open_corpus
from gatewright.experiments.arms import quick_form
from gatewright.experiments.granularity import GRANULARITY
from gatewright.experiments.lab import Plan, Record, _plain, _shared, kept, train
from gatewright.experiments.pages import measured_with
from gatewright.experiments.switch_figure1 import PLAN as FIGURE1
from gatewright.experiments.switch_figure1 import named
from gatewright.experiments.switch_table1 import PLAN as TABLE1
from gatewright.experiments.trial_pages import table
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
SEED = 4
# Both tables have one course and one dense twin.
_SWITCH = dataclasses.replace(TABLE1, arms=(*TABLE1.arms, FIGURE1.arm(named(64))))
SWEPT: dict[str, tuple[Plan, tuple[str, ...], str]] = {
    "switch/rates": (_SWITCH, ("dense", "Switch 1.25", "top-2 2", named(64)), "switch/table1, switch/figure1"),
    "olmoe/rates": (GRANULARITY, ("dense twin", "16 / 2"), "olmoe/granularity"),
}
CLAIM = (
    "each sparse arm is on the same side of the dense model at the rate that all arms share and with each at "
    "the best of its own four rates"
)
Result = tuple[Record, str, dict[str, Path]]


def run_rates(target: str, work: Path, quick: bool) -> Result:
    """Return the record and its page; quick: an eighth of the steps."""
    whole, names, of = SWEPT[target]
    plan = quick_form(whole) if quick else whole
    plan = dataclasses.replace(plan, seeds=(SEED,), evaluations=1)
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Record]] = {name: [] for name in names}
    jobs = [(rate, name) for rate in RATES for name in names]
    with Progress(target) as progress:
        corpus = open_corpus((), progress=progress.say)
        for place, (rate, name) in enumerate(jobs):
            progress.update(place / len(jobs), f"{name} at {rate:g} ({place + 1} of {len(jobs)})")
            own = dataclasses.replace(plan, learning_rate=rate)
            arm = dataclasses.replace(plan.arm(name), learning_rate=None)
            settings = {"arm": _plain(arm), "plan": _shared(own), "text": corpus.fingerprint}
            path = work / f"{name}-{rate:g}.json".replace("/", "-").replace(" ", "_")
            done = kept(path, settings, partial(train, own, arm, corpus, SEED))
            found[name].append({"learning_rate": rate, "valid_bpb": done["valid_bpb"]})
    record: Record = {
        "schema": "gatewright.rates.v1", "target": target, "of": of, "claim": CLAIM, "quick": quick,
        "plan": _shared(plan), "seed": SEED, "baseline": names[0], "shared": whole.learning_rate,
        "data": {"text": corpus.fingerprint}, "arms": found,
        "environment": environment("cpu"), "created": now(),
    }  # fmt: skip
    record["verdict"] = rates_verdict(record)
    return record, rates_page(record), {}


def best_of(record: Record, name: str) -> Record:
    """Return the entry of an arm's best rate; a run that diverged is never the best."""
    ended = [own for own in record["arms"][name] if own["valid_bpb"] is not None]
    return min(ended, key=lambda own: own["valid_bpb"])


def at_shared(record: Record, name: str) -> float | None:
    """Return an arm's bits per byte at the rate that the experiment's arms share; None if it diverged."""
    rate = record["shared"]
    return next(own["valid_bpb"] for own in record["arms"][name] if own["learning_rate"] == rate)


def rates_verdict(record: Record) -> Record:
    """Return whether each sparse arm is on the same side of the dense model either way, and by how much."""
    dense, rates = record["baseline"], [own["learning_rate"] for own in record["arms"][record["baseline"]]]
    sparse = [name for name in record["arms"] if name != dense]
    lost = [name for name in record["arms"] if at_shared(record, name) is None]
    if lost:
        return {"held": False, "sentence": f"did not hold: {', '.join(lost)} diverged at the shared rate"}
    best = {name: best_of(record, name) for name in record["arms"]}
    gaps = {
        name: {
            "shared": at_shared(record, dense) - at_shared(record, name),  # type: ignore[operator]
            "own": best[dense]["valid_bpb"] - best[name]["valid_bpb"],
        }
        for name in sparse
    }
    held = all((own["shared"] > 0) == (own["own"] > 0) for own in gaps.values())
    told = "; ".join(f"{name} {own['shared']:+.4f} and {own['own']:+.4f}" for name, own in gaps.items())
    ends = [name for name, own in best.items() if own["learning_rate"] in (rates[0], rates[-1])]
    more = f"; the best rate of {', '.join(ends)} is at the end of the list" if ends else ""
    at = ", ".join(f"{name} {own['learning_rate']:g}" for name, own in best.items())
    return {
        "held": held,
        "best": {name: own["learning_rate"] for name, own in best.items()},
        "gaps": gaps,
        "sentence": f"{'held' if held else 'did not hold'}: bits per byte below the dense model at "
        f"{record['shared']:g} for all, and each at its own best: {told} (best: {at}){more}",
    }


def rates_table(record: Record) -> list[str]:
    """Return the table of every arm at every rate."""
    rates = [own["learning_rate"] for own in record["arms"][record["baseline"]]]
    rows = []
    for name, own in record["arms"].items():
        values = [one["valid_bpb"] for one in own]
        rows.append([name, *("diverged" if value is None else f"{value:.4f}" for value in values)])
    return table(["bits per byte at", *(f"{rate:g}" for rate in rates)], rows)


def rates_page(record: Record) -> str:
    """Return the page: claim, verdict, every arm at every rate."""
    plan, quick = record["plan"], " --quick" if record["quick"] else ""
    lines = [
        f"# Learning rates of {record['of']}",
        "",
        f"Command: `gatewright reproduce {record['target']}{quick}`. Claim: {record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        *rates_table(record),
        f"Arms of `{record['of']}`, {plan['steps']} steps of {plan['rows']} x {plan['context']} tokens, seed "
        f"{record['seed']}, which no experiment has, as many rates for the dense model as for the others.",
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


SWEEPS: dict[str, tuple[str, Callable[[Path, bool], Result]]] = {
    target: (CLAIM, partial(run_rates, target)) for target in SWEPT
}
