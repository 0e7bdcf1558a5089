"""local_experts/ensemble: gates that see the input against joint weights that are the same for every case."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gatewright.data.vowels import peterson_barney
from gatewright.experiments.descent import descend
from gatewright.experiments.pages import measured_with
from gatewright.experiments.vowel_runs import READINGS, TEST, TRAIN, percents_right
from gatewright.inspection.plots.errors import draw_errors
from gatewright.papers import get_paper
from gatewright.training.seeded import drawn
from gatewright.training.workplace import environment, now

Record = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One system: how many experts, by which error, and which of the gate's weights stay at 0."""

    about: str
    num_experts: int
    error: str
    rate: float
    frozen: tuple[str, ...] = ()


_GATE = ("router.weight", "router.bias")
# 1.1 and 1.2 move each of eight a quarter as far as half its squared error would: hence four times the step.
ARMS: Mapping[str, Arm] = {
    "gated": Arm("4 experts, gates that see the input, 1.3", 4, "mixture", 0.05),
    "fixed": Arm(
        "6 experts, joint weights learned by 1.3, the same for all cases", 6, "mixture", 0.05, _GATE[:1]
    ),
    "averaged": Arm("8 nets that learn alone (1.2 at equal shares), averaged", 8, "expected", 0.2, _GATE),
    "together": Arm("8 nets whose average learns (1.1 at equal shares)", 8, "blend", 0.2, _GATE),
}
CLAIM = (
    "with as many weights, gates that see the input leave at most half of the test error of the best system "
    "whose weights are the same for all cases, and less in every seed"
)


@dataclass(frozen=True)
class Ensemble:
    """What is run."""

    seeds: int = 10
    updates: int = 3000


PLAN = Ensemble()


def run_ensemble(work: Path, quick: bool, plan: Ensemble = PLAN) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its picture; quick: two seeds, a third of the updates."""
    plan = replace(plan, seeds=2, updates=plan.updates // 3) if quick else plan
    arms = {name: {**asdict(arm), **_run(plan, arm)} for name, arm in ARMS.items()}
    record: Record = {"schema": "gatewright.ensemble.v1", "plan": asdict(plan), "systems": arms}
    record |= {"target": "local_experts/ensemble", "claim": CLAIM, "quick": quick}
    record |= {"environment": environment("cpu"), "created": now(), "verdict": verdict(record)}
    path = work / "errors.png"
    draw_errors({name: arm["test_error"] for name, arm in arms.items()}, path)
    return record, ensemble_page(record), {"errors": path}


def _run(plan: Ensemble, arm: Arm) -> Record:
    """Return errors and shares of right answers by seed, and how many weights are learned."""
    paper, reading = get_paper("local_experts"), READINGS["A"]
    settings = paper.Settings(num_experts=arm.num_experts, error=arm.error)
    models = [drawn(lambda: paper.build(settings), seed) for seed in range(plan.seeds)]
    train, test = (reading.cases(peterson_barney().of_speakers(who)) for who in (TRAIN, TEST))
    rates = [arm.rate] * plan.seeds
    done = descend(
        models, paper.objective(settings), train, rates, limit=plan.updates, reached=0.0, frozen=arm.frozen
    )
    error = (test[1] - done.answer(test[0]).blend).square().sum(-1).mean(-1)
    return {
        "weights": sum(p.numel() for name, p in models[0].named_parameters() if name not in arm.frozen),
        "train_error": done.squared_error.tolist(),
        "test_error": error.tolist(),
        "train_percent": percents_right(done, train),
        "test_percent": percents_right(done, test),
    }


def verdict(record: Record) -> Record:
    """Return whether the gated system's test error is lowest in every seed and at most half on average."""
    errors = {name: arm["test_error"] for name, arm in record["systems"].items()}
    means = {name: statistics.fmean(own) for name, own in errors.items()}
    best = min((name for name in errors if name != "gated"), key=lambda name: means[name])
    others = [own for name, own in errors.items() if name != "gated"]
    lowest = [own < min(rest) for own, *rest in zip(errors["gated"], *others, strict=True)]
    ratio = means["gated"] / means[best]
    held = ratio <= 0.5 and all(lowest)
    word = "held" if held else "did not hold"
    return {
        "held": held,
        "ratio": ratio,
        "best": best,
        "sentence": f"{word}: the gated mixture's test error is {ratio:.2f} of "
        f"that of the best other system ({best}), and the lowest in {sum(lowest)} of {len(lowest)} seeds",
    }


def ensemble_page(record: Record) -> str:
    """Return the page: claim, verdict, every system with every seed."""
    plan, quick = record["plan"], record["quick"]
    rows = []
    for name, arm in record["systems"].items():
        means = [statistics.fmean(arm[key]) for key in ("train_error", "test_error")]
        shares = [statistics.fmean(arm[key]) for key in ("train_percent", "test_percent")]
        cells = [name, arm["about"], str(arm["weights"]), *(f"{v:.4f}" for v in means)]
        rows.append([*cells, *(f"{v:.1f}" for v in shares), " ".join(f"{v:.3f}" for v in arm["test_error"])])
    head = [
        "system",
        "what",
        "weights",
        "train error",
        "test error",
        "train %",
        "test %",
        "test error by seed",
    ]
    lines = [
        "# Gates that see the input against fixed joint weights (1991)",
        "",
        f"Command: `gatewright reproduce {record['target']}{' --quick' if quick else ''}`. Claim: "
        f"{record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        f"![test error of every seed](local_experts-ensemble{'-quick' if quick else ''}-errors.png)",
        "",
        "| " + " | ".join(head) + " |",
        "|---|---" + "|--:" * (len(head) - 3) + "|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Reading A of table 1, same cases; {plan['updates']} updates, seeds 0 to {plan['seeds'] - 1}. "
        "Error: mean over cases of the squared difference between target and blend.",
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)
