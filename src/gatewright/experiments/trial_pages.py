"""Pages and pictures of experiments with the papers' own models, from their records and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gatewright.experiments.lab import Record
from gatewright.experiments.lab_pages import lab_pictures, mean_bits
from gatewright.experiments.pages import measured_with
from gatewright.experiments.trials import Course, Look, Source, run_course, text_stream
from gatewright.training.workplace import environment, now

Result = tuple[Record, str, dict[str, Path]]
_HEAD = (
    "arm",
    "bits per byte, mean",
    "by seed",
    "parameters: total",
    "active",
    "forward FLOPs per token",
    "step time over the baseline's",
)


def run_trials(
    course: Course,
    work: Path,
    quick: bool,
    target: str,
    title: str,
    claim: str,
    verdict: Callable[[Record], Record],
    *,
    look: Look | None = None,
    source: Source = text_stream,
    pictures: Callable[[Record, Path], dict[str, Path]] = lab_pictures,
) -> Result:
    """Return the record of all arms with its verdict, the page, and the pictures by name."""
    record = run_course(course.quick() if quick else course, work, target, look, source)
    record |= {"target": target, "claim": claim, "quick": quick}
    record |= {"environment": environment("cpu"), "created": now()}
    record["verdict"] = verdict(record)
    drawn = pictures(record, work)
    return record, trial_page(record, title, list(drawn)), drawn


def bits(record: Record, name: str) -> list[float | None]:
    """Return an arm's bits per byte by seed; None where it diverged."""
    return [own["valid_bpb"] for own in record["arms"][name]["seeds"]]


def above(record: Record, name: str, other: str) -> list[float] | None:
    """Return, by seed, by how many bits per byte the first arm ends above the second; None where a seed of
    either diverged.
    """
    pairs = list(zip(bits(record, name), bits(record, other), strict=True))
    found = [one - two for one, two in pairs if one is not None and two is not None]
    return found if len(found) == len(pairs) else None


def diverged(record: Record) -> list[str]:
    """Return the arms of which a seed diverged."""
    return [name for name in record["arms"] if None in bits(record, name)]


def _row(name: str, arm: Record) -> list[str]:
    by_seed = ["diverged" if own["valid_bpb"] is None else f"{own['valid_bpb']:.4f}" for own in arm["seeds"]]
    mean, cost, time = mean_bits(arm), arm["cost"], arm["step_time"]
    return [
        name,
        "-" if mean is None else f"{mean:.4f}",
        " ".join(by_seed),
        f"{cost['total_parameters']:,}",
        f"{cost['active_parameters']:,}",
        f"{cost['forward_flops_per_token']:,.0f}",
        f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})",
    ]


def table(head: tuple[str, ...] | list[str], rows: list[list[str]]) -> list[str]:
    """Return a table's lines, and an empty one."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def trial_page(record: Record, title: str, pictures: list[str]) -> str:
    """Return the page: claim, verdict, pictures, every arm with every seed, what else the verdict tells."""
    plan = record["plan"]
    quick = "-quick" if record["quick"] else ""
    command = f"gatewright reproduce {record['target']}{' --quick' if record['quick'] else ''}"
    notes = [f"- {name}: {arm['note']}" for name, arm in record["arms"].items() if arm["note"]]
    lines = [
        f"# {title}",
        "",
        f"Command: `{command}`. Claim: {record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
    ]
    for name in pictures:
        lines += [f"![{name}]({record['target'].replace('/', '-')}{quick}-{name}.png)", ""]
    lines += [
        *table(_HEAD, [_row(name, arm) for name, arm in record["arms"].items()]),
        *record["verdict"].get("table", []),
        f"{plan['steps']} steps of {plan['rows']} x {plan['context']} tokens (bytes of the default corpus), "
        f"AdamW at {plan['learning_rate']:g} unless an arm says otherwise, warm-up {plan['warmup_steps']} "
        f"steps, weight decay {plan['weight_decay']:g}; seeds {', '.join(map(str, plan['seeds']))}, all "
        "shown. Same tokens in the same order for every arm. FLOPs are of training's forward pass. Step "
        f"times: both sides alternate, {plan['timing_rounds']} rounds, median and range of paired ratios; "
        f"baseline: {record['baseline']}, measured against itself to show the noise. Intervals: Student's t "
        "over seeds, paired.",
        "",
        *notes,
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)
