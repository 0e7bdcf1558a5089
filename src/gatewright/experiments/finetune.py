"""Fine-tune a run on a small task, and say how often it is right about texts that it has not seen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatewright.data.tasks import PARTS, Task, open_task
from gatewright.errors import UserError
from gatewright.evaluation.candidates import score_of
from gatewright.training.checks import check_settings
from gatewright.training.finetuner import FineTuner, fit, tuned_run
from gatewright.training.interrupt import stop_on_signals
from gatewright.training.load import LoadedRun, load_run
from gatewright.training.loop import refuse_used, resume_or_begin, write_result
from gatewright.training.result import STOPPED, RecordedRun
from gatewright.training.runlog import Progress, RunLog
from gatewright.training.task_rows import TaskRows
from gatewright.training.workplace import command_line, environment, now, own_folder

Record = dict[str, Any]


@dataclass(frozen=True)
class FineTuneRun:
    """Fine-tune a run on a task. What is not said here is as in the run."""

    task: str = "domain"
    """brown, language, domain or relation"""
    out: str = "runs/finetune"
    """folder of the fine-tuned model, a run like any other"""
    steps: int = 160
    """optimizer steps"""
    rows: int = 32
    """texts per step"""
    learning_rate: float = 2e-3
    """peak learning rate; a warm-up of a tenth of the steps, then a cosine"""
    dropout: float | None = None
    """share of everything that is dropped in training; none is the run's (papers that have it: switch)"""
    expert_dropout: float | None = None
    """share of the experts' hidden units that is dropped in training; none is the run's"""
    capacity_factor: float | None = None
    """places per expert in fine-tuning; none is dropless"""
    evaluations: int = 4
    """evaluations on the dev texts; the weights of the best one are what is kept"""
    seed: int = 0
    """orders the texts and draws the dropout"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    device: str = "cpu"
    """cpu, cuda, or cuda:N"""
    resume: bool = False
    """continue from the newest whole checkpoint in `out`"""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps {self.steps}; allowed: 1 or more")


class FineTuneResult(RecordedRun):
    """What finetune.json holds, and where."""

    def to_text(self) -> str:
        """Return the result in a few lines."""
        if self.record is None:
            return STOPPED
        own = self.record
        labels = ", ".join(f"{label} {100 * share:.0f} %" for label, share in own["by_label"].items())
        return (
            f"{own['task']}: right about {100 * own['test']['accuracy']:.1f} % of {own['sizes']['test']} "
            f"test texts (by chance {100 / len(own['by_label']):.1f} %), with the weights of step "
            f"{own['dev']['step']} of {own['steps']} (dev {100 * own['dev']['accuracy']:.1f} %)\n"
            f"{labels}\neverything: {self.out}/finetune.json"
        )


def tuned_settings(loaded: LoadedRun, options: FineTuneRun) -> Any:
    """Return the model's settings with the options' dropout and capacity.

    Raises: UserError for a dropout that the paper does not have.
    """
    names = {field.name for field in dataclasses.fields(loaded.settings)}
    changes: Record = {}
    for name in ("dropout", "expert_dropout"):
        share = getattr(options, name)
        if share is not None and name not in names:
            raise UserError(
                f"{name} {share} for paper {loaded.run.paper!r}, which has none; allowed: a paper whose "
                "settings have it, as switch's; leave it out"
            )
        changes |= {} if share is None else {name: share}
    if getattr(loaded.settings, "capacity_factor", None) is not None:
        changes["capacity_factor"] = options.capacity_factor
    return dataclasses.replace(loaded.settings, **changes)


def finetune(run: str | Path, options: FineTuneRun | None = None, task: Task | None = None) -> FineTuneResult:
    """Fine-tune the run in a folder on a task and write OUT/finetune.json; OUT is a run like any other.

    Args: `task` takes the place of the one that the options name.
    Raises: UserError as `load_run` and `open_task`, and where the model is no decoder; RunFailure for a loss
    that is not finite: the last checkpoint stays whole and `resume` continues from it.
    """
    options, started = options or FineTuneRun(), Path(run)
    loaded, out = load_run(started), Path(options.out)
    settings = tuned_settings(loaded, options)
    if out.resolve() == started.resolve():
        raise UserError(f"--out {out} is the run's own folder; give another")
    refuse_used(out, options.resume, "finetune.json")
    if options.threads:
        torch.set_num_threads(options.threads)
    with Progress(f"finetune {options.task}") as progress:
        task = task or open_task(options.task, progress=progress.say)
        text = TaskRows(task, loaded.tokenizer, settings.context, options.seed)
        given = ("out", "learning_rate", "evaluations", "seed", "threads", "device", "resume")
        more = {name: getattr(options, name) for name in given}
        own = tuned_run(loaded.run, settings, text, options.rows, options.steps, **more)
        check_settings(dataclasses.replace(own, batch_tokens=settings.context))
        trainer = FineTuner(own, text, loaded.model)
        with own_folder(out), stop_on_signals() as stop:
            refuse_used(out, options.resume, "finetune.json")
            resume_or_begin(trainer, out, progress)
            log = RunLog(out, trainer.step)
            try:
                whole = fit(trainer, out / "checkpoints", stop, progress.update, log)
            finally:
                log.close()
            if not whole:
                return FineTuneResult(out, None, True)
            record = _record(trainer, task, options, started)
            write_result(out / "finetune.json", record)
    return FineTuneResult(out, record, False)


def _record(trainer: FineTuner, task: Task, options: FineTuneRun, started: Path) -> Record:
    """Return what the best weights of the dev texts came to on the test texts."""
    scores, right = trainer.scores("test"), torch.from_numpy(trainer.text.labels["test"])
    found = score_of(scores, right)
    by_label = {
        label: score_of(scores[right == place], right[right == place]).accuracy
        for place, label in enumerate(task.labels)
    }
    return {
        "schema": "gatewright.finetune.v1",
        "command": command_line(),
        "created": now(),
        "environment": environment(options.device),
        "run": str(started),
        "task": task.name,
        "sizes": {part: len(task.parts[part]) for part in PARTS},
        "steps": options.steps,
        "dev": trainer.best_at,
        "curve": trainer.history.curve,
        "test": {"accuracy": found.accuracy, "nats": found.nats},
        "by_label": by_label,
    }
