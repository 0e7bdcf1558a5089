"""deepseek_v3/mtp: the second token predicted in training or not, and how often a guess of it is right."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gatewright.backbones import AheadReader, Decoder
from gatewright.experiments.lab import Record
from gatewright.experiments.paired import interval
from gatewright.experiments.trial_pages import Result, above, bits, diverged, run_trials, table
from gatewright.experiments.trials import Course, Trained, paper_trial
from gatewright.kernels import apply_linears

OFF, ON = "next token only", "and the second"
PROMPTS, PROMPT, NEW = 4, 64, 64  # per domain: texts, their ids, and ids written behind them
LEAST = 0.5
COURSE = Course(
    trials=(
        paper_trial(OFF, "deepseek_v3", "no further block", future_tokens=0),
        paper_trial(ON, "deepseek_v3", "a further block, weight lambda 0.3", future_tokens=1),
    ),
    baseline=OFF,
    rows=8,
    steps=1024,
)
CLAIM = (
    "at half or more of the places of real text the guess of the second token is what the main head, which "
    "sees one token more, finds likeliest, in every seed; bits per byte of the main head and the time of a "
    "step are measured"
)


def run_mtp(work: Path, quick: bool) -> Result:
    """Return the record, its page and its picture; quick: one seed, an eighth of the steps."""
    title = "Multi-token prediction (DeepSeek-V3)"
    return run_trials(COURSE, work, quick, "deepseek_v3/mtp", title, CLAIM, mtp_verdict, look=look)


@torch.no_grad()
def accepted_in_writing(model: Decoder, prompt: torch.Tensor, new: int) -> tuple[int, int]:
    """Return (guesses that were right, guesses made) while `new` ids are drawn from the model behind `prompt`
    [1, S].
    """
    draw = torch.Generator().manual_seed(0)
    reader, text, right, made = AheadReader(model, prompt.shape[1] + new + 1), prompt, 0, 0
    for _ in range(new):
        open_guess, passes = reader.guess is not None, reader.passes
        logits = reader.read(text)
        made += open_guess
        # A read without a pass gave what the pass before had guessed.
        right += open_guess and reader.passes == passes
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=draw)
        text = torch.cat([text, drawn], dim=1)
    return right, made


@torch.no_grad()
def accepted_in_text(model: Decoder, windows: torch.Tensor) -> tuple[int, int]:
    """Return at how many places of real text [N, S] the further block's likeliest id is the one that the main
    head, which sees one token more, takes for likeliest; and how many places there are.
    """
    x, _ = model.read(windows, with_stats=False)
    states = model.norm(x)
    (main,) = apply_linears(states, (model.head,))
    ahead, _ = model.ahead(states[:, :-1], windows[:, 1:], 1)
    (further,) = apply_linears(ahead, (model.head,))
    same = further.argmax(dim=-1) == main[:, 1:].argmax(dim=-1)
    return int(same.sum()), same.numel()


def look(trained: Trained) -> Record:
    """Return how often the second token was guessed right; nothing for a model that does not predict it."""
    model = trained.model
    if not len(model.future):
        return {}
    model.eval()
    size, written, read = trained.course.context, np.zeros(2), np.zeros(2)
    prompt = min(PROMPT, size // 2)
    for text in trained.texts.values():
        ids = torch.as_tensor(np.asarray(text), dtype=torch.int64)
        windows = ids[: len(ids) // size * size].view(-1, size)
        for part in windows.split(trained.course.rows):
            read += accepted_in_text(model, part)
        for window in windows[:PROMPTS]:
            written += accepted_in_writing(model, window[None, :prompt], min(NEW, size - prompt - 1))
    model.train()
    return {
        "accepted": {
            "written": float(written[0] / max(written[1], 1)),
            "guesses": int(written[1]),
            "text": float(read[0] / read[1]),
        }
    }


def mtp_verdict(record: Record) -> Record:
    """Return whether at least half of the guesses on real text are right in every seed, and what else was
    measured.
    """
    if lost := diverged(record):
        return {"held": False, "sentence": f"did not hold: {', '.join(lost)} diverged"}
    seeds: list[Any] = record["arms"][ON]["seeds"]
    text = [own["accepted"]["text"] for own in seeds]
    written = statistics.fmean(own["accepted"]["written"] for own in seeds)
    held = min(text) >= LEAST
    more, time = above(record, ON, OFF) or [], record["arms"][ON]["step_time"]
    return {
        "held": held,
        "accepted": text,
        "more_bpb": more,
        "table": _table(record),
        "sentence": f"{'held' if held else 'did not hold'}: of the guesses "
        + ", ".join(f"{100 * share:.0f} %" for share in text)
        + f" are right on real text and {100 * written:.0f} % in writing by drawn ids; the main head ends "
        f"{interval(more)} bits per byte above the model without, and a step takes {time['median']:.2f} "
        f"times as long ({time['low']:.2f} to {time['high']:.2f})",
    }


def _table(record: Record) -> list[str]:
    seeds = record["arms"][ON]["seeds"]
    rows = [
        [
            str(own["seed"]),
            f"{without:.4f}",
            f"{own['valid_bpb']:.4f}",
            f"{100 * own['accepted']['written']:.1f} % of {own['accepted']['guesses']}",
            f"{100 * own['accepted']['text']:.1f} %",
        ]
        for own, without in zip(seeds, bits(record, OFF), strict=True)
        if without is not None
    ]
    head = (
        "seed",
        f"bits per byte, {OFF}",
        f"bits per byte, {ON}",
        "guesses right in writing by drawn ids",
        "on real text",
    )
    return table(head, rows)
