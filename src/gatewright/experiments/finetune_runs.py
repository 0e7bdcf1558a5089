"""Models of the fine-tuning tables: each is pretrained once and kept, and fine-tuned on every task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gatewright.data import Corpus, open_corpus
from gatewright.data.hashing import digest
from gatewright.data.tasks import Task, open_task
from gatewright.errors import RunFailure
from gatewright.experiments.lab import Record, kept
from gatewright.experiments.to_end import Show, run_to_end
from gatewright.experiments.twin import dense_twin
from gatewright.papers.switch import Settings
from gatewright.training.checkpoint import clear_leftovers, newest_checkpoint, save_checkpoint
from gatewright.training.finetuner import FineTuner, TaughtFineTuner, fit, tuned_run
from gatewright.training.interrupt import StopRequest
from gatewright.training.run import TrainRun
from gatewright.training.task_rows import TaskRows
from gatewright.training.trainer import Trainer


@dataclass(frozen=True)
class Side:
    """One way to fine-tune: of the sparse model or its dense twin, with these shares left out, taught by the
    side `teacher` where there is one. `learning_rate` is the side's own; None: the plan's.
    """

    name: str
    sparse: bool
    dropout: float
    expert_dropout: float = 0.0
    teacher: str = ""
    learning_rate: float | None = None

    def to_dict(self) -> Record:
        """Return plain data; a rate only where it is the side's own."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """What is run: the sparse model and its dense twin, trained on text once; then each side on each task
    with each seed, which orders the examples and draws the dropout. `dense_pretraining_rate` is the twin's
    own; None: `pretraining_rate`.
    """

    target: str
    sides: tuple[Side, ...]
    tasks: tuple[str, ...] = ("brown", "language", "domain", "relation")
    model: Settings = field(default_factory=lambda: Settings(num_experts=8))
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 4_915_200
    batch_tokens: int = 4096
    warmup_steps: int = 100
    pretraining_rate: float = 1.2e-2  # the best of switch/text-rates, of both
    dense_pretraining_rate: float | None = None
    steps: int = 160
    rows: int = 32
    learning_rate: float = 8e-3  # the best of switch/tuning-rates, of every side
    evaluations: int = 4
    teacher_weight: float = 0.25
    eval_bytes: int = 131_072
    data: tuple[str, ...] = ()
    tokenizer: str = "bpe:1024"

    def to_dict(self) -> Record:
        """Return plain data."""
        told = {key: value for key, value in asdict(self).items() if value is not None}
        return {**told, "sides": [side.to_dict() for side in self.sides]}


def quick_form(plan: Plan) -> Plan:
    """Return the plan that takes minutes: seed 0, a quarter of the tokens, half of the steps."""
    return replace(
        plan,
        seeds=plan.seeds[:1],
        tokens=plan.tokens // 4,
        warmup_steps=plan.warmup_steps // 4,
        steps=plan.steps // 2,
        eval_bytes=plan.eval_bytes // 2,
    )


class Bench:
    """The models of a plan in one folder; what is finished is read, what was stopped goes on."""

    def __init__(self, plan: Plan, corpus: Corpus, work: Path, stop: StopRequest) -> None:
        self.plan, self.corpus, self.work, self.stop = plan, corpus, work, stop
        self.settings = {True: plan.model, False: dense_twin("switch", plan.model)}
        own = plan.to_dict()
        # What only says which runs there are is no part of a run.
        self._shared = {k: v for k, v in own.items() if k not in ("target", "sides", "tasks", "seeds")}
        self._trained: dict[bool, nn.Module] = {}

    def run(self, sparse: bool) -> TrainRun:
        """Return the run that trains a model on text."""
        plan, rate = self.plan, self.plan.dense_pretraining_rate
        return TrainRun(
            paper="switch",
            model=self.settings[sparse],
            data=plan.data,
            tokenizer=plan.tokenizer,
            tokens=plan.tokens,
            batch_tokens=plan.batch_tokens,
            warmup_steps=plan.warmup_steps,
            learning_rate=plan.pretraining_rate if sparse or rate is None else rate,
            eval_bytes=plan.eval_bytes,
            evaluations=1,
            ema=0.0,
        )

    def pretrained(self, sparse: bool, show: Show) -> Record:
        """Return what a model came to on text; it stays in the folder."""
        name = _kind(sparse)
        settings = {"plan": self._shared, "sparse": sparse, "text": self.corpus.fingerprint}
        folder = self.work / f"{name}-{_key(settings)}"

        def work() -> Record:
            trainer = Trainer(self.run(sparse), self.corpus, "model")
            run_to_end(trainer, folder, name, show, self.stop)
            save_checkpoint(folder, trainer.checkpoint(), 1)
            bits = trainer.evaluate().bits_per_byte
            parameters = trainer.cost.total_parameters
            return {"bits_per_byte": bits, "parameters": parameters, "seconds": trainer.seconds}

        record = kept(self.work / f"{name}.json", settings, work)
        self._trained[sparse] = self._read(Trainer(self.run(sparse), self.corpus, "model"), folder)
        return record

    def _read(self, trainer: Trainer, folder: Path) -> nn.Module:
        held = newest_checkpoint(folder)
        if held is None:
            raise RunFailure(f"{folder} holds no checkpoint any more; remove {self.work} to start anew")
        trainer.restore(held)
        return trainer.model

    def tuner(self, side: Side, task: Task, seed: int, teacher: nn.Module | None = None) -> FineTuner:
        """Return what fine-tunes one side on one task."""
        plan = self.plan
        # Padding is all alike: with a capacity, it would crowd out text.
        dropouts = {"dropout": side.dropout, "expert_dropout": side.expert_dropout}
        settings = replace(self.settings[side.sparse], capacity_factor=None, **dropouts)
        text = TaskRows(task, self.corpus.tokenizer, settings.context, seed)
        rate = plan.learning_rate if side.learning_rate is None else side.learning_rate
        more = {"learning_rate": rate, "evaluations": plan.evaluations, "seed": seed}
        run = tuned_run(self.run(side.sparse), settings, text, plan.rows, plan.steps, **more)
        start = self._trained[side.sparse]
        if teacher is None:
            return FineTuner(run, text, start, side.name)
        return TaughtFineTuner(run, text, start, side.name, teacher, plan.teacher_weight, False)

    def tuned(self, side: Side, task: Task, seed: int, show: Show) -> Record:
        """Return what one side came to on a task's test texts, with the weights of the best dev score."""
        taught_by = next((own for own in self.plan.sides if own.name == side.teacher), None)
        settings = self._about(side, task, seed)
        folder = self._folder(side, task, seed)

        def work() -> Record:
            teacher = None
            if taught_by is not None:
                held = self._folder(taught_by, task, seed)
                teacher = self._read(self.tuner(taught_by, task, seed), held)
            trainer = self.tuner(side, task, seed, teacher)
            clear_leftovers(folder)
            begun = newest_checkpoint(folder)
            if begun is not None:
                trainer.restore(begun)
            what = f"{side.name}, {task.name}, seed {seed}"
            if not fit(trainer, folder, self.stop, lambda share, state: show(share, f"{what}: {state}")):
                raise RunFailure(f"stopped at {what}; the same command goes on from here")
            test = trainer.score("test")
            return {
                "accuracy": test.accuracy,
                "nats": test.nats,
                "dev": trainer.best_at,
                "curve": trainer.history.curve,
                "parameters": trainer.cost.total_parameters,
                "seconds": trainer.seconds,
            }

        record = kept(self.work / f"{_name(side)}-{task.name}-{seed}.json", settings, work)
        if not any(own.teacher == side.name for own in self.plan.sides):
            shutil.rmtree(folder, ignore_errors=True)
        return record

    def _about(self, side: Side, task: Task, seed: int) -> Record:
        own = {"plan": self._shared, "side": side.to_dict(), "seed": seed, "task": task.fingerprint}
        taught_by = next((one for one in self.plan.sides if one.name == side.teacher), None)
        more = {"teacher": None if taught_by is None else taught_by.to_dict()}
        return {**own, **more, "text": self.corpus.fingerprint}

    def _folder(self, side: Side, task: Task, seed: int) -> Path:
        about = self._about(side, task, seed)
        return self.work / "tuned" / f"{_name(side)}-{task.name}-{seed}-{_key(about)}"


def _kind(sparse: bool) -> str:
    return "sparse" if sparse else "dense"


def _name(side: Side) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in side.name)


def _key(settings: Mapping[str, Any]) -> str:
    """Return eight letters for settings: other ones never go on from these ones' checkpoints."""
    return digest([json.dumps(settings, sort_keys=True)])[:8]


def run_plan(plan: Plan, work: Path, say: Callable[[float, str], None], stop: StopRequest) -> Record:
    """Return {"plan", "pretrained": {kind: {}}, "tasks": {name: {labels, sizes}}, "sides": {name: {task:
    [one record per seed]}}}.
    """
    work.mkdir(parents=True, exist_ok=True)
    corpus = open_corpus(plan.data, tokenizer=plan.tokenizer, progress=lambda line: say(0.0, line))
    bench, done = Bench(plan, corpus, work, stop), 0
    # A model takes as long on text as some ten fine-tunings.
    weight = 10
    total = 2 * weight + len(plan.sides) * len(plan.tasks) * len(plan.seeds)

    def show(share: float, state: str, part: int = 1) -> None:
        say((done + part * share) / total, state)

    pretrained: Record = {}
    for sparse in (True, False):
        pretrained[_kind(sparse)] = bench.pretrained(sparse, partial(show, part=weight))
        done += weight
    tasks = {name: open_task(name, progress=partial(show, 0.0)) for name in plan.tasks}
    sides: Record = {side.name: {name: [] for name in plan.tasks} for side in plan.sides}
    for seed in plan.seeds:
        for name, task in tasks.items():
            for side in plan.sides:
                found = bench.tuned(side, task, seed, show)
                sides[side.name][name].append({"seed": seed, **found})
                done += 1
    about = {
        name: {"labels": task.labels, "sizes": {part: len(own) for part, own in task.parts.items()}}
        for name, task in tasks.items()
    }
    record = {"plan": plan.to_dict(), "pretrained": pretrained, "tasks": about, "sides": sides}
    plain: Record = json.loads(json.dumps({"schema": "gatewright.finetuned.v1", **record}))
    return plain
