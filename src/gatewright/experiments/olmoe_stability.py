"""olmoe/stability: z-loss, QK-norm and truncated weights, each taken away, at a high learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from gatewright.backbones import Attention, Block, Decoder
from gatewright.experiments.lab import Record
from gatewright.experiments.paired import interval
from gatewright.experiments.trial_pages import Result, above, bits, run_trials, table
from gatewright.experiments.trials import Course, Trained, paper_trial

BASE, NO_Z, NO_NORM, PLAIN = "as the paper", "no z-loss", "no QK-norm", "normal, not truncated"
STD, RATE = 0.02, 2e-2
WINDOW, SPREADS, RISE = 32, 4.0, 0.5


def without_qk_norm(model: Decoder) -> None:
    """Put attention of the same weights, but without QK-norm, in every block."""
    for block in (own for own in model.layers if isinstance(own, Block)):
        own = block.attention
        assert isinstance(own, Attention)
        plain = Attention(model.width, own.num_heads, own.num_kv_heads, own.head_dim)
        plain.load_state_dict({key: weight for key, weight in own.state_dict().items() if "norm" not in key})
        block.attention = plain


def not_truncated(model: Decoder) -> None:
    """Draw every matrix from a normal of the paper's std, without a cut."""
    for weight in (p for p in model.parameters() if p.dim() > 1):
        nn.init.normal_(weight, std=STD)


COURSE = Course(
    trials=(
        paper_trial(BASE, "olmoe", "z-loss 0.001, QK-norm, normal cut at 3 std"),
        paper_trial(NO_Z, "olmoe", z_weight=0.0),
        paper_trial(NO_NORM, "olmoe", change=without_qk_norm),
        paper_trial(PLAIN, "olmoe", change=not_truncated),
    ),
    baseline=BASE,
    rows=8,
    steps=1024,
    learning_rate=RATE,
)
CLAIM = (
    "at a high learning rate the model ends with more bits per byte on average, or diverges in a seed, "
    "without QK-norm; without z-loss and with weights that are not truncated nothing is claimed"
)


def run_stability(work: Path, quick: bool) -> Result:
    """Return the record, its page and its picture; quick: one seed, an eighth of the steps."""
    title = "Stability at a high learning rate (OLMoE)"
    return run_trials(COURSE, work, quick, "olmoe/stability", title, CLAIM, stability_verdict, look=look)


def spikes(losses: Sequence[float]) -> int:
    """Return at how many steps the loss lies more than 4 standard deviations above the mean of the 32 steps
    before it.
    """
    found = 0
    for step in range(WINDOW, len(losses)):
        before = losses[step - WINDOW : step]
        found += losses[step] > statistics.fmean(before) + SPREADS * statistics.pstdev(before)
    return found


def went_up(losses: Sequence[float]) -> bool:
    """Say whether a run ended half a nat or more above where it had been: mean losses of twentieths of it."""
    size = max(len(losses) // 20, 1)
    means = [statistics.fmean(losses[at : at + size]) for at in range(0, len(losses) - size + 1, size)]
    return means[-1] >= min(means) + RISE


def look(trained: Trained) -> Record:
    """Return how smoothly a run went."""
    return {"spikes": spikes(trained.losses), "went_up": went_up(trained.losses)}


def lost(record: Record, name: str) -> int:
    """Return how many seeds of an arm diverged: no number, or half a nat up at the end."""
    seeds = record["arms"][name]["seeds"]
    return sum(own["valid_bpb"] is None or own["went_up"] for own in seeds)


def stability_verdict(record: Record) -> Record:
    """Return whether QK-norm takes bits off, or keeps seeds from diverging, and every arm's effect."""
    if lost(record, BASE):
        return {
            "held": False,
            "table": _table(record),
            "sentence": f"did not hold: {lost(record, BASE)} seeds of the model {BASE} diverged",
        }
    effects = {name: above(record, name, BASE) for name in (NO_NORM, NO_Z, PLAIN)}
    gone, norm = lost(record, NO_NORM), effects[NO_NORM]
    held = gone > 0 or (norm is not None and statistics.fmean(norm) > 0)
    return {
        "held": held,
        "above_bpb": effects,
        "table": _table(record),
        "sentence": f"{'held' if held else 'did not hold'}: against the model {BASE}, "
        + "; ".join(
            f"{name} ends {'nowhere' if more is None else f'{interval(more)} bits per byte'} above, "
            f"{lost(record, name)} seeds diverged"
            for name, more in effects.items()
        ),
    }


def _table(record: Record) -> list[str]:
    """Return a row per arm: spikes and diverged seeds."""
    rows = []
    for name, arm in record["arms"].items():
        told = ["-" if own["valid_bpb"] is None else str(own["spikes"]) for own in arm["seeds"]]
        rows.append([name, ", ".join(told), f"{lost(record, name)} of {len(bits(record, name))}"])
    return [
        f"A spike: a loss more than {SPREADS:g} standard deviations above the mean of the {WINDOW} steps "
        f"before. Diverged: no number, or a last twentieth of the run {RISE:g} nats above an earlier one.",
        "",
        *table(("arm", "spikes, by seed", "diverged"), rows),
    ]
