"""Teachers and students of the distillation tables: each model is trained once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gatewright.data import Corpus, open_corpus
from gatewright.errors import RunFailure
from gatewright.evaluation import compression, gain_kept
from gatewright.experiments.lab import kept
from gatewright.experiments.to_end import Show, run_to_end
from gatewright.experiments.twin import dense_twin
from gatewright.papers.switch import Settings
from gatewright.training.checkpoint import newest_checkpoint, save_checkpoint
from gatewright.training.distiller import Distiller
from gatewright.training.interrupt import StopRequest, stop_on_signals
from gatewright.training.run import TrainRun
from gatewright.training.runlog import Progress
from gatewright.training.trainer import Trainer

Record = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """One way to teach: the teacher's share of the task loss, and whether non-expert weights are copied."""

    name: str
    teacher_weight: float
    copy: bool


# Narrow, so that many tokens per weight are affordable: a student that is still far from its best gains by
# any head start, whoever gave it.
SMALL = Settings(width=32, head_dim=16, expert_width=128, ffn_width=128)


@dataclass(frozen=True)
class Plan:
    """What is run: for each seed one plain dense model, the same trained twice as long (a second schedule
    from its own weights, as a student has one from the teacher's), each teacher, and its students.
    `teacher_rate` is the teachers' peak rate; None: `learning_rate`, that of all others.
    """

    target: str
    num_experts: tuple[int, ...]
    recipes: tuple[Recipe, ...]
    tokens: int
    model: Settings = SMALL
    seeds: tuple[int, ...] = (0, 1, 2)
    # switch/distill-rates: the dense model's best, and within noise the teacher's.
    learning_rate: float = 1.2e-2
    teacher_rate: float | None = None
    warmup_steps: int = 100
    batch_tokens: int = 8192
    eval_bytes: int = 262_144
    data: tuple[str, ...] = ()

    def to_dict(self) -> Record:
        """Return plain data; a rate of the teachers only where they have their own."""
        told = {key: value for key, value in asdict(self).items() if value is not None}
        plain: Record = json.loads(json.dumps(told))
        return plain


def quick_form(plan: Plan) -> Plan:
    """Return the plan that takes minutes: seed 0, three eighths of the tokens, the outer teachers."""
    ends = (plan.num_experts[0], plan.num_experts[-1])
    experts = tuple(dict.fromkeys(ends))
    return replace(
        plan,
        num_experts=experts,
        seeds=(0,),
        tokens=plan.tokens * 3 // 8,
        warmup_steps=plan.warmup_steps // 2,
        eval_bytes=plan.eval_bytes // 4,
    )


class SeedModels:
    """The models of one seed, each trained once and kept."""

    def __init__(self, plan: Plan, seed: int, corpus: Corpus, work: Path, stop: StopRequest) -> None:
        self.plan, self.seed, self.corpus, self.work, self.stop = plan, seed, corpus, work, stop
        # One student for all teachers, as in the paper: the twin of the largest.
        largest = replace(plan.model, num_experts=max(plan.num_experts))
        self.student = dense_twin("switch", largest)
        self.folders: dict[str, Path] = {}

    def run(self, model: Settings) -> TrainRun:
        """Return the training run that all models of the seed share but for their shape, and teachers for
        their rate.
        """
        plan, rate = self.plan, self.plan.teacher_rate
        return TrainRun(
            paper="switch",
            model=model,
            data=plan.data,
            tokens=plan.tokens,
            seed=self.seed,
            learning_rate=plan.learning_rate if rate is None or model == self.student else rate,
            warmup_steps=plan.warmup_steps,
            batch_tokens=plan.batch_tokens,
            eval_bytes=plan.eval_bytes,
            evaluations=1,
            ema=0.0,
        )

    def trained(self, name: str, what: Record, make: Callable[[], Trainer], show: Show) -> Record:
        """Return what a model came to; done already, it is read."""
        settings = {"plan": _shared(self.plan), "seed": self.seed, "what": what}
        settings["text"] = self.corpus.fingerprint
        folder = self.folders[name] = self.work / f"seed{self.seed}" / f"{name}-{_digest(settings)}"

        def work() -> Record:
            trainer = make()
            run_to_end(trainer, folder, f"{name}, seed {self.seed}", show, self.stop)
            save_checkpoint(folder, trainer.checkpoint(), 1)
            bits = trainer.evaluate()
            return {
                "bits_per_byte": bits.bits_per_byte,
                "domains": bits.domains,
                "parameters": trainer.cost.total_parameters,
                "seconds": trainer.seconds,
                "num_bytes": bits.num_bytes,
            }

        return kept(self.work / f"seed{self.seed}-{name}.json", settings, work)

    def plain(self, model: Settings) -> Trainer:
        """Return the trainer of a model without a teacher."""
        return Trainer(self.run(model), self.corpus, "model")

    def finished(self, name: str, model: Settings) -> nn.Module:
        """Return a model that is trained already."""
        trainer, folder = self.plain(model), self.folders[name]
        held = newest_checkpoint(folder)
        if held is None:
            raise RunFailure(f"{folder} holds no checkpoint any more; remove {self.work} to start anew")
        trainer.restore(held)
        return trainer.model

    def taught(self, num_experts: int, recipe: Recipe) -> Trainer:
        """Return the trainer of a student."""
        model = replace(self.plan.model, num_experts=num_experts)
        teacher, run = self.finished(f"teacher-{num_experts}", model), self.run(self.student)
        return Distiller(run, self.corpus, "student", teacher, recipe.teacher_weight, recipe.copy)

    def longer(self) -> Trainer:
        """Return the trainer of the dense model that goes on from its own weights, all of them, untaught."""
        dense, run = self.finished("dense", self.student), self.run(self.student)
        return Distiller(run, self.corpus, "longer", dense, 0.0, True)


def _digest(settings: Record) -> str:
    """Return eight letters for settings: other ones never go on from these ones' checkpoints."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _shared(plan: Plan) -> Record:
    """Return a plan as plain data, less what only says which models are trained."""
    told = plan.to_dict().items()
    own: Record = {k: v for k, v in told if k not in ("num_experts", "recipes", "seeds", "target")}
    # One student's shape follows from the largest teacher.
    own["largest"] = max(plan.num_experts)
    return own


def run_distilled(plan: Plan, work: Path) -> Record:
    """Return every model of every seed: {"seeds": [{"seed", "dense", "longer", "teachers": {E: {}}}]}."""
    work.mkdir(parents=True, exist_ok=True)
    of_seed = 2 + len(plan.num_experts) * (1 + len(plan.recipes))
    total, seeds, done = of_seed * len(plan.seeds), [], 0
    with Progress(plan.target) as progress, stop_on_signals() as stop:
        corpus = open_corpus(plan.data, progress=progress.say)

        def show(share: float, state: str) -> None:
            progress.update((done + share) / total, f"model {done + 1} of {total}: {state}")

        for seed in plan.seeds:
            own = SeedModels(plan, seed, corpus, work, stop)
            dense = own.trained("dense", {}, partial(own.plain, own.student), show)
            done += 1
            longer = own.trained("dense-longer", {"from": "dense"}, own.longer, show)
            done += 1
            teachers: Record = {}
            for number in plan.num_experts:
                model, name = replace(plan.model, num_experts=number), f"teacher-{number}"
                found = own.trained(name, {"experts": number}, partial(own.plain, model), show)
                done += 1
                students: Record = {}
                for place, recipe in enumerate(plan.recipes):
                    what = {"experts": number, **asdict(recipe)}
                    make = partial(own.taught, number, recipe)
                    student = own.trained(f"student-{number}-{place}", what, make, show)
                    students[recipe.name] = student | _kept(student, found, dense)
                    done += 1
                teachers[str(number)] = found | {"students": students}
            seeds.append({"seed": seed, "dense": dense, "longer": longer, "teachers": teachers})
    return {"schema": "gatewright.distilled.v1", "plan": plan.to_dict(), "seeds": seeds}


def _kept(student: Record, teacher: Record, dense: Record) -> Record:
    bits = [own["bits_per_byte"] for own in (student, teacher, dense)]
    smaller = compression(student["parameters"], teacher["parameters"])
    return {"gain_kept_percent": gain_kept(*bits), "compression_percent": smaller}
