"""Sweeps of learning rates: what the rate that an experiment's arms share does to their order.

Arms of an experiment at four rates or more each, with a seed that no experiment has: the dense model gets
as many runs as every sparse one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
    "switch/rates": (
        _SWITCH,
        ("dense", "Switch 1.25", "top-2 2", named(64)),
        "switch/table1, switch/figure1",
    ),
    "olmoe/rates": (GRANULARITY, ("dense twin", "16 / 2"), "olmoe/granularity"),
}
# With these four some arm had its best at the end of the list.
_HIGHER = dict.fromkeys(("switch/rates", "switch/text-rates", "switch/distill-rates"), (2.4e-2,))
CLAIM = (
    "each sparse arm is on the same side of the dense model at the rate that all arms share and with each at "
    "the best of its own rates"
)
# What a sweep measures (lower is better): key of its entries, words of its page.
MEASURES = {
    "valid_bpb": "bits per byte",
    "dev_nats": "dev nats per token",
    "dev_error": "per cent of dev texts wrong, mean over tasks",
}
Result = tuple[Record, str, dict[str, Path]]


def run_rates(target: str, work: Path, quick: bool) -> Result:
    """Return the record and its page; quick: an eighth of the steps."""
    whole, names, of = SWEPT[target]
    rates = rates_of(target)
    plan = quick_form(whole) if quick else whole
    plan = dataclasses.replace(plan, seeds=(SEED,), evaluations=1)
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Record]] = {name: [] for name in names}
    jobs = [(rate, name) for rate in rates for name in names]
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
    told = {"plan": _shared(plan), "data": {"text": corpus.fingerprint}}
    return swept(target, of, whole.learning_rate, found, quick, told)


def rates_of(target: str) -> tuple[float, ...]:
    """Return the rates of a sweep, rising."""
    return RATES + _HIGHER.get(target, ())


def swept(
    target: str, of: str, shared: float, found: Mapping[str, list[Record]], quick: bool, more: Record
) -> Result:
    """Return the record of a sweep, whose first arm is the dense model, and its page.

    `found`: by arm an entry per rate. `more`: "plan" and "data", and if it is not bits per byte "measure"
    (a key of MEASURES and of the entries) and "course" (words).
    """
    record: Record = {
        "schema": "gatewright.rates.v1", "target": target, "of": of, "claim": CLAIM, "quick": quick,
        "seed": SEED, "baseline": next(iter(found)), "shared": shared, **more, "arms": dict(found),
        "environment": environment("cpu"), "created": now(),
    }  # fmt: skip
    record["verdict"] = rates_verdict(record)
    return record, rates_page(record), {}


def _key(record: Record) -> str:
    return str(record.get("measure", "valid_bpb"))


def best_of(record: Record, name: str) -> Record:
    """Return the entry of an arm's best rate; a run that diverged is never the best."""
    key = _key(record)
    ended = [own for own in record["arms"][name] if own[key] is not None]
    return min(ended, key=lambda own: own[key])


def at_shared(record: Record, name: str) -> float | None:
    """Return what an arm measured at the rate that the experiment's arms share; None if it diverged."""
    rate, key = record["shared"], _key(record)
    return next(own[key] for own in record["arms"][name] if own["learning_rate"] == rate)


def rates_verdict(record: Record) -> Record:
    """Return whether each sparse arm is on the same side of the dense model either way, and by how much."""
    dense, rates = record["baseline"], [own["learning_rate"] for own in record["arms"][record["baseline"]]]
    key = _key(record)
    sparse = [name for name in record["arms"] if name != dense]
    lost = [name for name in record["arms"] if at_shared(record, name) is None]
    if lost:
        return {"held": False, "sentence": f"did not hold: {', '.join(lost)} diverged at the shared rate"}
    best = {name: best_of(record, name) for name in record["arms"]}
    gaps = {
        name: {
            "shared": at_shared(record, dense) - at_shared(record, name),  # type: ignore[operator]
            "own": best[dense][key] - best[name][key],
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
        "sentence": f"{'held' if held else 'did not hold'}: {MEASURES[key]} below the dense model at "
        f"{record['shared']:g} for all, and each at its own best: {told} (best: {at}){more}",
    }


def rates_table(record: Record) -> list[str]:
    """Return the table of every arm at every rate."""
    rates, key = [own["learning_rate"] for own in record["arms"][record["baseline"]]], _key(record)
    rows = []
    for name, own in record["arms"].items():
        values = [one[key] for one in own]
        rows.append([name, *("diverged" if value is None else f"{value:.4f}" for value in values)])
    return table([f"{MEASURES[key]} at", *(f"{rate:g}" for rate in rates)], rows)


def rates_page(record: Record) -> str:
    """Return the page: claim, verdict, every arm at every rate."""
    plan, quick = record["plan"], " --quick" if record["quick"] else ""
    course = record.get("course") or f"{plan['steps']} steps of {plan['rows']} x {plan['context']} tokens"
    lines = [
        f"# Learning rates of {record['of']}",
        "",
        f"Command: `gatewright reproduce {record['target']}{quick}`. Claim: {record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        *rates_table(record),
        f"Arms of `{record['of']}`, {course}, seed {record['seed']}, which no experiment has, as many rates "
        "for the dense model as for the others.",
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


SWEEPS: dict[str, tuple[str, Callable[[Path, bool], Result]]] = {
    target: (CLAIM, partial(run_rates, target)) for target in SWEPT
}
