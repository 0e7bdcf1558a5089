"""Distil a sparse run into a dense student, and say what the student kept of the teacher's gain."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewright.data import Corpus
from gatewright.errors import UserError
from gatewright.evaluation import compression, gain_kept
from gatewright.experiments.twin import dense_twin
from gatewright.objectives import check_teacher_weight
from gatewright.parts import MoELayer
from gatewright.training.checks import micro_batch_size
from gatewright.training.distiller import Distiller, Start
from gatewright.training.evaluate import EvalRun, evaluate_run
from gatewright.training.load import LoadedRun, load_run
from gatewright.training.loop import train, write_result
from gatewright.training.result import STOPPED, RecordedRun
from gatewright.training.run import TrainRun
from gatewright.training.workplace import command_line, environment, now

Record = dict[str, Any]


@dataclass(frozen=True)
class DistillRun:
    """Distil a sparse run. What is not said here is as in the teacher's own run."""

    out: str = "runs/distill"
    """folder of the student's run, with the plain twin's in OUT/twin"""
    teacher_weight: float = 0.25
    """the teacher's share of the task loss; the right answers have the rest"""
    copy: bool = True
    """start from the teacher's non-expert weights"""
    twin: str | None = None
    """folder of a plain dense twin that is trained already; none trains one, on as many tokens"""
    tokens: int | None = None
    """tokens to train student and twin on; none is as many as the teacher's run"""
    learning_rate: float | None = None
    """peak learning rate of student and twin; none is the teacher's"""
    seed: int | None = None
    """seed of the new weights of student and twin; none is the teacher's"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    device: str = "cpu"
    """cpu, cuda, or cuda:N"""
    resume: bool = False
    """continue from the newest whole checkpoint in `out`"""

    def __post_init__(self) -> None:
        check_teacher_weight(self.teacher_weight)


class DistillResult(RecordedRun):
    """What distill.json holds, and where."""

    def to_text(self) -> str:
        """Return the result in a few lines."""
        if self.record is None:
            return STOPPED
        rows = [
            f"{name:8s} {own['bits_per_byte']:.4f} bits per byte, {own['parameters']:,} parameters"
            for name, own in self.record["models"].items()
        ]
        start = self.record["start"]
        told = f"{len(start['copied'])} weights from the teacher, {len(start['new'])} new"
        return "\n".join([*rows, self.record["sentence"], f"{told}; all by name in {self.out}/distill.json"])


def student_run(loaded: LoadedRun, options: DistillRun) -> TrainRun:
    """Return the training run of the student: the teacher's, with the shape of its dense twin.

    Raises: UserError if the teacher is dense, or no decoder.
    """
    if not any(isinstance(module, MoELayer) for module in loaded.model.modules()):
        raise UserError("the run is dense; allowed: a sparse one; give the folder of a model with experts")
    own = loaded.run
    given = {"tokens": options.tokens, "learning_rate": options.learning_rate, "seed": options.seed}
    changes: Record = {key: value for key, value in given.items() if value is not None}
    changes |= {"threads": options.threads, "device": options.device, "resume": options.resume}
    changes |= {"out": options.out, "minutes": None, "until_loss": None}
    return dataclasses.replace(own, model=dense_twin(own.paper, loaded.settings), **changes)


def distill(teacher: str | Path, options: DistillRun | None = None) -> DistillResult:
    """Train a student of the run in the folder `teacher`, and its plain twin; write OUT/distill.json.

    The student's folder is a run like any other. Raises: UserError as `load_run` and `train`, and where the
    teacher's text has changed since; `resume` continues whichever of the two was not finished.
    """
    options = options or DistillRun()
    loaded = load_run(teacher, device=options.device)
    run = student_run(loaded, options)
    if Path(options.out).resolve() == Path(teacher).resolve():
        raise UserError(f"--out {options.out} is the teacher's own folder; give another")
    twin = _given_twin(options, loaded, run)
    starts: list[Start] = []

    def make(run: TrainRun, corpus: Corpus) -> Distiller:
        if corpus.fingerprint != loaded.corpus:
            raise UserError(
                f"{teacher} was trained on other text or another tokenizer than its settings give now; "
                "allowed: the same text; bring it back, or train the teacher anew"
            )
        made = Distiller(run, corpus, "student", loaded.model, options.teacher_weight, options.copy)
        starts.append(made.start)
        return made

    if train(run, make, title="student").stopped:
        return DistillResult(Path(options.out), None, True)
    if twin is None:
        twin = Path(options.out) / "twin"
        begun = (twin / "run.toml").exists() or (twin / "checkpoints").exists()
        if train(dataclasses.replace(run, out=str(twin), resume=begun), title="twin").stopped:
            return DistillResult(Path(options.out), None, True)
    folders = {"teacher": Path(teacher), "student": Path(options.out), "twin": twin}
    record = _record(folders, run, options) | {"start": dataclasses.asdict(starts[0])}
    write_result(Path(options.out) / "distill.json", record)
    return DistillResult(Path(options.out), record, False)


def _given_twin(options: DistillRun, loaded: LoadedRun, student: TrainRun) -> Path | None:
    """Return the folder of a twin that is trained already, if it is one of the student's shape and text."""
    if options.twin is None:
        return None
    held = load_run(options.twin)
    if held.corpus != loaded.corpus or (held.run.paper, held.settings) != (student.paper, student.model):
        what = "of other text" if held.corpus != loaded.corpus else "no plain model of the student's shape"
        raise UserError(
            f"--twin {options.twin} is {what}; allowed: a dense twin of the teacher, trained on its text"
        )
    return Path(options.twin)


def _record(folders: dict[str, Path], run: TrainRun, options: DistillRun) -> Record:
    """Return the figures of the three models on the same validation text, and what they say."""
    # As many texts at a time as in training: how many tokens a teacher's experts may take depends on it.
    rows = micro_batch_size(run, run.model.context)
    asked = EvalRun(eval_bytes=run.eval_bytes, batch_size=rows, device=options.device)
    models: dict[str, Record] = {}
    for name, folder in folders.items():
        found, held = evaluate_run(folder, asked), load_run(folder)
        models[name] = {
            "folder": str(folder),
            "bits_per_byte": found.bits_per_byte,
            "domains": found.domains,
            "parameters": sum(p.numel() for p in held.model.parameters()),
            "tokens": held.step * held.run.batch_tokens,
        }
    bits = {name: own["bits_per_byte"] for name, own in models.items()}
    kept = gain_kept(bits["student"], bits["teacher"], bits["twin"])
    smaller = compression(models["student"]["parameters"], models["teacher"]["parameters"])
    return {
        "schema": "gatewright.distill.v1",
        "command": command_line(),
        "created": now(),
        "environment": environment(options.device),
        "teacher_weight": options.teacher_weight,
        "models": models,
        "gain_kept_percent": kept,
        "compression_percent": smaller,
        "sentence": sentence(kept, smaller, bits),
    }


def sentence(kept: float | None, smaller: float, bits: dict[str, float]) -> str:
    """Return what was kept, in words."""
    if kept is None:
        return (
            f"the teacher has no gain to keep: {bits['teacher']:.4f} bits per byte against the plain twin's "
            f"{bits['twin']:.4f}; the student is {smaller:.1f} % smaller"
        )
    return (
        f"the student keeps {kept:.0f} % of the teacher's gain over the plain twin "
        f"({bits['twin'] - bits['teacher']:.4f} bits per byte) and is {smaller:.1f} % smaller"
    )
