"""Small models of the papers' own settings, trained arm by arm on the default corpus and then looked at.

As in the lab, every arm sees the same text in the same order from the same seed; here an arm brings its own
model and objective, an experiment its own look at what was trained. A finished arm is kept as a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gatewright.backbones import Decoder, count_cost
from gatewright.data import Corpus, open_corpus
from gatewright.evaluation import bits_per_byte, take_bytes
from gatewright.experiments.lab import Record, kept
from gatewright.experiments.steps import Stepper, Stream, step_time_ratio
from gatewright.objectives import NextToken
from gatewright.papers import get_paper
from gatewright.training.runlog import Progress


@dataclass(frozen=True)
class Trial:
    """One arm: `make(vocab_size)` gives a fresh model and its objective; `about` is all that it depends on,
    as plain data. `learning_rate` in place of the course's.
    """

    name: str
    make: Callable[[int], tuple[Decoder, NextToken]]
    about: Record
    note: str = ""
    learning_rate: float | None = None


@dataclass(frozen=True)
class Course:
    """What all arms share. `evaluations` of the validation text, evenly along a run."""

    trials: tuple[Trial, ...]
    baseline: str
    steps: int = 512
    rows: int = 16
    context: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rate: float = 3e-3
    warmup_steps: int = 32
    weight_decay: float = 0.1
    eval_bytes: int = 65_536
    evaluations: int = 1
    timing_rounds: int = 11

    def quick(self) -> Course:
        """Return the form that takes minutes: seed 0, an eighth of the steps, less text to evaluate."""
        return dataclasses.replace(
            self,
            seeds=(0,),
            steps=max(self.steps // 8, 1),
            warmup_steps=max(self.warmup_steps // 4, 1),
            eval_bytes=self.eval_bytes // 4,
            timing_rounds=3,
        )

    def trial(self, name: str) -> Trial:
        """Return the arm of that name."""
        return next(trial for trial in self.trials if trial.name == name)


@dataclass(frozen=True)
class Trained:
    """What an experiment may look at: the model, the loss of every step in nats, the text to evaluate."""

    model: Decoder
    corpus: Corpus
    course: Course
    seed: int
    losses: list[float]
    texts: Mapping[str, Any] = field(repr=False)


Look = Callable[[Trained], Record]
Source = Callable[[Corpus, Course], Stream]


def paper_trial(
    name: str,
    paper: str,
    note: str = "",
    *,
    change: Callable[[Decoder], None] | None = None,
    losses: Mapping[str, float] | None = None,
    **settings: Any,
) -> Trial:
    """Return an arm of a paper's Settings, the vocabulary the corpus's own; `change` is applied to the fresh
    model, `losses` by name take the place of the paper's objective.
    """
    module = get_paper(paper)
    own = module.Settings(**settings)

    def make(vocab_size: int) -> tuple[Decoder, NextToken]:
        model = module.build(dataclasses.replace(own, vocab_size=vocab_size))
        if change is not None:
            change(model)
        return model, module.objective(own) if losses is None else NextToken(losses=losses)

    about = {"paper": paper, **_plain(dataclasses.asdict(own))}
    return Trial(name, make, about if losses is None else {**about, "losses": dict(losses)}, note)


def text_stream(corpus: Corpus, course: Course) -> Stream:
    """Return the training text as it is."""
    return corpus.stream(course.rows, course.context, seed=0)


def run_course(
    course: Course, work: Path, about: str, look: Look | None = None, source: Source = text_stream
) -> Record:
    """Return {"schema", "plan", "baseline", "data", "arms": {name: {"seeds": [...], "step_time": ...}}}."""
    work.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Record] = {trial.name: {**_told(trial), "seeds": []} for trial in course.trials}
    with Progress(about) as progress:
        corpus = open_corpus((), progress=progress.say)
        jobs = [(seed, trial) for seed in course.seeds for trial in course.trials]
        for place, (seed, trial) in enumerate(jobs):
            progress.update(place / len(jobs), f"{trial.name}, seed {seed} ({place + 1} of {len(jobs)})")
            settings = {"arm": _told(trial), "plan": _shared(course), "text": corpus.fingerprint}
            todo = partial(train_trial, course, trial, corpus, seed, look, source)
            path = work / f"{_file_name(trial.name)}-{seed}.json"
            arms[trial.name]["seeds"].append(kept(path, {**settings, "seed": seed}, todo))
        for trial in course.trials:
            progress.update(1.0, f"step time of {trial.name}")
            settings = {"arm": _told(trial), "plan": _shared(course), "text": corpus.fingerprint}
            path = work / f"{_file_name(trial.name)}-time.json"
            arms[trial.name]["step_time"] = kept(
                path, settings, partial(_times, course, trial, corpus, source)
            )
            arms[trial.name]["cost"] = _cost(course, trial, corpus.tokenizer.vocab_size)
    plan = _shared(course)
    data = {"text": corpus.fingerprint}
    return {
        "schema": "gatewright.arms.v1",
        "plan": plan,
        "baseline": course.baseline,
        "data": data,
        "arms": arms,
    }


def stepper(course: Course, trial: Trial, corpus: Corpus, seed: int, source: Source = text_stream) -> Stepper:
    """Return what trains one arm."""
    torch.manual_seed(seed)
    model, objective = trial.make(corpus.tokenizer.vocab_size)
    rate = course.learning_rate if trial.learning_rate is None else trial.learning_rate
    own = dataclasses.replace(course, learning_rate=rate)
    found = Stepper(model, source(corpus, course), own, {}, seed)
    found.objective = objective
    return found


def train_trial(
    course: Course, trial: Trial, corpus: Corpus, seed: int, look: Look | None, source: Source = text_stream
) -> Record:
    """Return what one arm came to with one seed: quality along its way, and what the look at it found.

    A loss that is no number ends the run: "valid_bpb" is then None, and "diverged_at" the step.
    """
    side = stepper(course, trial, corpus, seed, source)
    texts = _texts(course, corpus)
    losses: list[float] = []
    path: list[Record] = []
    every = max(course.steps // course.evaluations, 1)
    for step in range(1, course.steps + 1):
        losses.append(side.advance()[0])
        if not math.isfinite(losses[-1]):
            return {"seed": seed, "diverged_at": step, "valid_bpb": None, "path": path}
        if step % every == 0 and step < course.steps:
            path.append({"step": step, "valid_bpb": _bits(side, course, corpus, texts)["valid_bpb"]})
    final = _bits(side, course, corpus, texts)
    path.append({"step": course.steps, "valid_bpb": final["valid_bpb"]})
    record: Record = {"seed": seed, **final, "path": path}
    if look is not None:
        assert isinstance(side.model, Decoder)
        record |= look(Trained(side.model, corpus, course, seed, losses, texts))
    return record


def _bits(side: Stepper, course: Course, corpus: Corpus, texts: Mapping[str, Any]) -> Record:
    lengths = corpus.tokenizer.byte_lengths
    found = bits_per_byte(side.model, texts, lengths, context=course.context, batch_size=course.rows)
    return {"valid_bpb": found.bits_per_byte, "domains": found.domains, "num_bytes": found.num_bytes}


def _texts(course: Course, corpus: Corpus) -> dict[str, Any]:
    """Return the validation text, the domains in equal shares."""
    lengths, share = corpus.tokenizer.byte_lengths, max(1, course.eval_bytes // len(corpus.domains))
    return {d: take_bytes(corpus.valid(d).tokens, lengths, share) for d in corpus.domains}


def _times(course: Course, trial: Trial, corpus: Corpus, source: Source) -> Record:
    """Return the step time of an arm over the baseline's, from alternating steps of both; a baseline is
    measured against itself, which shows the noise.
    """
    both = [stepper(course, own, corpus, 0, source) for own in (course.trial(course.baseline), trial)]
    return step_time_ratio(both[0], both[1], course.timing_rounds)


def _cost(course: Course, trial: Trial, vocab_size: int) -> Record:
    """Return an arm's parameters and forward FLOPs per token."""
    cost = count_cost(trial.make(vocab_size)[0], course.context)
    return {
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "forward_flops_per_token": cost.forward_flops_per_token,
        "flops": cost.flops,
    }


def _told(trial: Trial) -> Record:
    """Return an arm as plain data: what it depends on."""
    about = {"name": trial.name, "note": trial.note, "causal": True, **_plain(trial.about)}
    return about if trial.learning_rate is None else {**about, "learning_rate": trial.learning_rate}


def _shared(course: Course) -> Record:
    """Return what all arms share, as plain data."""
    own = {f.name: getattr(course, f.name) for f in dataclasses.fields(course) if f.name != "trials"}
    return _plain(own)


def _plain(value: Mapping[str, Any]) -> Record:
    told: Record = json.loads(json.dumps(value, default=str))
    return told


def _file_name(name: str) -> str:
    return name.replace("/", "-").replace(" ", "_")
