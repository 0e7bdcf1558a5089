"""local_experts/figure2 and figure3: the experts' lines on the formant plane, and how they came there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.data.vowels import peterson_barney
from gatewright.experiments.descent import Descent, descend
from gatewright.experiments.pages import measured_with
from gatewright.experiments.vowel_runs import ALIVE, READINGS, TRAIN
from gatewright.inspection.plots.lines import draw_lines, draw_paths
from gatewright.papers import get_paper
from gatewright.training.seeded import drawn
from gatewright.training.workplace import environment, now

Record = dict[str, Any]
Run = Callable[[Path, bool], tuple[Record, str, dict[str, Path]]]

READING = READINGS["A"]
# Places in VOWELS of the two pairs that the paper tells apart.
PAIRS = {"[i], [I]": (0, 1), "[a], [^]": (2, 3)}
LINES_CLAIM = (
    "some experts end unused, and each pair of vowels has an expert of its own, whose line is within 2 "
    "points of the one learned from that pair alone"
)
PATHS_CLAIM = "the lines of all experts first come together, then part; " + LINES_CLAIM


@dataclass(frozen=True)
class Figure:
    """What is run. Of `alone` updates are the lines that one expert learns from one pair."""

    num_experts: int
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    rate: float = 0.05
    limit: int = 4000
    alone: int = 3000


def figure_target(plan: Figure, name: str, claim: str) -> Run:
    """Return what runs figure2 (where the lines lie) or figure3 (how they came there)."""

    def run(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
        own = dataclasses.replace(plan, seeds=plan.seeds[:1]) if quick else plan
        record = run_figure(own)
        record |= {"target": f"local_experts/{name}", "claim": claim, "quick": quick}
        record |= {"environment": environment("cpu"), "created": now()}
        record["verdict"] = verdict(record, paths=name == "figure3")
        path = work / f"{name}.png"
        if name == "figure3":
            draw_paths(record["runs"][0]["feet"], record["runs"][0]["used"], record["alone"], path)
        else:
            vowels = peterson_barney().of_speakers(TRAIN)
            draw_lines(vowels.formants / 1000, vowels.vowel, record["runs"][0], path)
        return record, figure_page(record, name), {"lines": path}

    return run


def run_figure(plan: Figure) -> Record:
    """Return every seed's lines at the end, their way there, and the lines that one expert learns alone."""
    seen: dict[int, list[Tensor]] = {place: [] for place in range(len(plan.seeds))}

    def watch(epoch: int, live: Tensor, weights: Mapping[str, Tensor]) -> None:
        lines = torch.cat([weights["experts.weight"].flatten(2), weights["experts.bias"]], -1).detach()
        for place, own in zip(live.tolist(), lines, strict=True):
            seen[place].append(own.clone())

    paper, vowels = get_paper("local_experts"), peterson_barney().of_speakers(TRAIN)
    settings = paper.Settings(num_experts=plan.num_experts)
    models = [drawn(lambda: paper.build(settings), seed) for seed in plan.seeds]
    rates, cases = [plan.rate] * len(models), READING.cases(vowels)
    done = descend(
        models,
        paper.objective(settings),
        cases,
        rates,
        limit=plan.limit,
        reached=READING.reached,
        watch=watch,
    )
    vowel = torch.from_numpy(vowels.vowel)
    pairs = {name: torch.isin(vowel, torch.tensor(pair)) for name, pair in PAIRS.items()}
    alone = {name: _alone(plan, (cases[0][own], cases[1][own])) for name, own in pairs.items()}
    runs = [_run(plan, place, done, seen[place], cases, pairs) for place in range(len(plan.seeds))]
    for run in runs[1:]:
        del run["feet"]  # only the first is drawn
    return {"schema": "gatewright.lines.v1", "plan": asdict(plan), "alone": alone, "runs": runs}


def _alone(plan: Figure, cases: tuple[Tensor, Tensor]) -> Record:
    """Return the line that one expert learns from these cases, its foot and the per cent it gets right."""
    paper = get_paper("local_experts")
    settings = paper.Settings(num_experts=1)
    model = drawn(lambda: paper.build(settings), 0)
    done = descend([model], paper.objective(settings), cases, [plan.rate], limit=plan.alone, reached=0.0)
    line = torch.cat([done.weights["experts.weight"].flatten(), done.weights["experts.bias"].flatten()])
    return {"line": line.tolist(), "foot": feet(line).tolist(), "percent": percent_right(line, cases)}


def feet(lines: Tensor) -> Tensor:
    """Return the point of each line [..., 3] that is nearest to the origin, [..., 2].

    Equation: w.x + b = 0 -> -b w / |w|^2, the dots of figure 3.
    """
    weight, bias = lines[..., :2], lines[..., 2:]
    return -bias * weight / weight.square().sum(-1, keepdim=True)


def percent_right(line: Tensor, cases: tuple[Tensor, Tensor]) -> float:
    """Return how many of the cases lie on the side of the line [3] that their target says."""
    x, targets = cases
    right = (x @ line[:2] + line[2] > 0) == (targets[:, 0] > 0.5)
    return float(100 * right.double().mean())


def together(lines: Tensor) -> Tensor:
    """Return how far lines [..., E, 3] point one way: 1 if all do, near 0 if they point anywhere, [...].

    Equation: |mean_e w_e / |w_e||.
    """
    weight = lines[..., :2]
    return (weight / weight.norm(dim=-1, keepdim=True)).mean(-2).norm(dim=-1)


def _run(
    plan: Figure,
    place: int,
    done: Descent,
    seen: list[Tensor],
    cases: tuple[Tensor, Tensor],
    pairs: Mapping[str, Tensor],
) -> Record:
    """Return one seed's record; `feet` are those of every fifth epoch."""
    path = torch.stack(seen)
    share = torch.softmax(done.answer(cases[0]).logits[place], -1)
    used = [e for e in range(plan.num_experts) if float(share[:, e].max()) > ALIVE]
    best = {}
    for name, own in pairs.items():
        percents = {e: percent_right(path[-1, e], (cases[0][own], cases[1][own])) for e in used}
        expert = max(used, key=lambda e: percents[e])
        best[name] = {
            "expert": expert,
            "percent": percents[expert],
            "share": float(share[own, expert].mean()),
        }
    bound = together(path)
    return {
        "seed": plan.seeds[place],
        "epochs": None if int(done.epochs[place]) < 0 else int(done.epochs[place]),
        "used": used,
        "lines": path[-1].tolist(),
        "gate": torch.cat(
            [done.weights[f"router.{n}"][place].view(plan.num_experts, -1) for n in ("weight", "bias")], -1
        ).tolist(),
        "pairs": best,
        "together": {
            "start": float(bound[0]),
            "most": float(bound.max()),
            "most_at": int(bound.argmax()),
            "end": float(bound[-1]),
        },
        "feet": [[[round(v, 4) for v in foot] for foot in row] for row in feet(path[::5]).tolist()],
    }


def verdict(record: Record, paths: bool) -> Record:
    """Return whether every seed shows what is claimed, and in how many each part of it is so."""
    runs, alone = record["runs"], record["alone"]
    unused = [len(run["used"]) < record["plan"]["num_experts"] for run in runs]
    apart = [len({own["expert"] for own in run["pairs"].values()}) == len(PAIRS) for run in runs]
    near = [
        all(own["percent"] >= alone[name]["percent"] - 2 for name, own in run["pairs"].items())
        for run in runs
    ]
    met = [
        run["together"]["most"] >= 0.9
        and run["together"]["most"] > max(run["together"]["start"], run["together"]["end"])
        for run in runs
    ]
    held = all(unused) and all(apart) and all(near) and (all(met) or not paths)
    first = f"the lines come together and part in {sum(met)} of {len(runs)} runs; " if paths else ""
    return {
        "held": held,
        "sentence": f"{'held' if held else 'did not hold'}: {first}experts end unused in {sum(unused)}, "
        f"either pair has an expert of its own in {sum(apart)}, and its line is as good as one learned "
        f"alone in {sum(near)} of {len(runs)} runs",
    }


def figure_page(record: Record, name: str) -> str:
    """Return the page: claim, verdict, picture, every seed."""
    plan, quick = record["plan"], record["quick"]
    head = ["seed", "epochs", "used experts", *(f"{pair}: expert, % right" for pair in PAIRS)]
    head += ["together at the start, most (epoch), end"]
    rows = []
    for run in record["runs"]:
        bound = run["together"]
        rows.append(
            [
                str(run["seed"]),
                "never" if run["epochs"] is None else str(run["epochs"]),
                ", ".join(map(str, run["used"])),
                *(f"{own['expert']}, {own['percent']:.1f}" for own in run["pairs"].values()),
                f"{bound['start']:.2f}, {bound['most']:.2f} ({bound['most_at']}), {bound['end']:.2f}",
            ]
        )
    alone = ", ".join(f"{own['percent']:.1f} % on {pair}" for pair, own in record["alone"].items())
    shown = "the way of each expert's line" if name == "figure3" else "the lines of the used experts"
    lines = [
        f"# Figure {name[-1]} of Adaptive Mixtures of Local Experts (1991)",
        "",
        f"Command: `gatewright reproduce {record['target']}{' --quick' if quick else ''}`. Claim: "
        f"{record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        f"![{shown}](local_experts-{name}{'-quick' if quick else ''}-lines.png)",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "--:|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"{plan['num_experts']} experts, {READING.about}, step size {plan['rate']:g}, as table 1 otherwise; "
        f"the picture is that of seed {plan['seeds'][0]}. Learned alone, a line gets right {alone}. "
        "Together: length of the mean of the lines' unit normals.",
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


FIGURES: dict[str, tuple[str, Run]] = {
    "local_experts/figure2": (LINES_CLAIM, figure_target(Figure(4), "figure2", LINES_CLAIM)),
    "local_experts/figure3": (PATHS_CLAIM, figure_target(Figure(8), "figure3", PATHS_CLAIM)),
}
