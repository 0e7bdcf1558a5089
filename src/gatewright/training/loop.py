"""Train one model to the end of its budget: the loop around a Trainer, with logs, checkpoints, a result
and a report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatewright.data import Corpus, open_corpus
from gatewright.errors import RunFailure, UserError
from gatewright.inspection import write_report
from gatewright.training.checkpoint import clear_leftovers, newest_checkpoint, save_checkpoint, write_atomic
from gatewright.training.checks import check_settings
from gatewright.training.interrupt import stop_on_signals
from gatewright.training.result import data_record, side_record
from gatewright.training.run import LoopSettings, TrainRun
from gatewright.training.runlog import Progress, RunLog, load_line
from gatewright.training.settings_file import check_same_settings, write_settings
from gatewright.training.trainer import Trainer
from gatewright.training.workload import workload_lines
from gatewright.training.workplace import command_line, environment, now, own_folder


@dataclass(frozen=True)
class TrainResult:
    """`record` is what train.json holds; `stopped` says that the user ended the run before its budget."""

    out: Path
    record: dict[str, Any]
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the headline and where everything is."""
        side = self.record["runs"][0]["sides"][0]
        return {
            "out": str(self.out),
            "stopped": self.stopped,
            "bits_per_byte": side["final"]["valid_bpb"],
            "domains": side["final"]["domains"],
            "steps": side["steps"],
            "tokens": side["final"]["tokens"],
            "train_seconds": side["train_seconds"],
            "total_parameters": side["total_parameters"],
            "active_parameters": side["active_parameters"],
            "result": str(self.out / "train.json"),
            "report": str(self.out / "report.html"),
        }

    def to_text(self) -> str:
        """Return the result in a few lines."""
        d = self.to_dict()
        ended = "stopped, `--resume` continues" if self.stopped else "done"
        return (
            f"{ended}: {d['bits_per_byte']:.4f} bits per byte after {d['tokens']:,} tokens in "
            f"{d['train_seconds']:.0f} s\n"
            f"report: {d['report']}"
        )


def prepare(run: LoopSettings, say: Any = None) -> Corpus:
    """Set the threads that the run asks for and open its corpus."""
    if run.threads:
        torch.set_num_threads(run.threads)
    return open_corpus(run.data, tokenizer=run.tokenizer, seed=run.data_seed, progress=say)


def refuse_used(out: Path, resume: bool, result: str) -> None:
    """Raise UserError if `out` is a file, or holds a run that this one would overwrite."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file; allowed: a folder, new or of an earlier run; give another --out")
    if not resume and (
        (out / "checkpoints").exists() or (out / result).exists() or (out / "run.toml").exists()
    ):
        raise UserError(f"{out} already holds a run; continue it with --resume, or give another --out")


def train(
    run: TrainRun, make: Callable[[TrainRun, Corpus], Trainer] | None = None, title: str = ""
) -> TrainResult:
    """Train `run` and return its result; writes run.toml, log.jsonl, tensorboard/, checkpoints/, train.json
    and report.html.

    Args: `make` builds another trainer than the plain one, as for a student; `title` stands before lines of
    progress, in place of the paper.
    Raises: UserError for settings or data that cannot work; RunFailure for a full disk or a loss that is not
    finite: the last checkpoint stays whole and `resume` continues from it.
    """
    out = Path(run.out)
    refuse_used(out, run.resume, "train.json")
    check_settings(run)
    with Progress(title or run.paper) as progress:
        corpus = prepare(run, progress.say)
        trainer = Trainer(run, corpus, run.paper) if make is None else make(run, corpus)
        with own_folder(out):
            # Again, now that no other run can begin here.
            refuse_used(out, run.resume, "train.json")
            resume_or_begin(trainer, out, progress)
            log = RunLog(out, trainer.step)
            try:
                stopped = _loop(trainer, out, log, progress)
            finally:
                log.close()
            return _finish(trainer, out, stopped)


def resume_or_begin(trainer: Trainer, out: Path, progress: Progress) -> None:
    """Say how the work is spread; restore the newest whole checkpoint of `out` if the run resumes and has
    one; else write its run.toml.
    """
    for line in workload_lines(trainer.name, trainer.tokens_per_expert):
        progress.say(line)
    settings = out / "run.toml"
    clear_leftovers(out)
    clear_leftovers(out / "checkpoints")
    if trainer.run.resume and (settings.exists() or (out / "checkpoints").exists()):
        check_same_settings(settings, trainer.run, trainer.settings)
        held = newest_checkpoint(out / "checkpoints", progress.say)
        if held is not None:
            trainer.restore(held)
            progress.say(f"{trainer.name}: continuing from step {trainer.step}")
        return
    # run.toml comes last: where it stands, everything that a continuation needs does.
    write_atomic(out / "tokenizer.json", trainer.corpus.tokenizer.to_json())
    write_settings(settings, trainer.run, trainer.settings)


def _loop(trainer: Trainer, out: Path, log: RunLog, progress: Progress) -> bool:
    """Step until the budget is spent or a stop is asked for; return whether it was asked for."""
    run, folder = trainer.run, out / "checkpoints"
    saved = trainer.step
    with stop_on_signals() as stop:
        while not trainer.done and not stop:
            record = trainer.advance()
            if record["step"] % run.log_every == 0:
                log.write("step", record)
                rate = trainer.step_tokens / max(record["step_seconds"], 1e-9)
                state = (
                    f"loss {record['loss']:.3f}  {rate / 1000:.1f}k tokens/s  {load_line(trainer.history)}"
                )
                progress.update(trainer.progress, state)
            if evaluation_is_due(trainer):
                bits = trainer.evaluate()
                log.write("evaluation", trainer.history.curve[-1])
                progress.say(
                    f"step {trainer.step}: {bits.bits_per_byte:.4f} bits per byte on validation text"
                )
            if trainer.step % run.checkpoint_every == 0:
                save_checkpoint(folder, trainer.checkpoint(), run.keep_checkpoints)
                saved = trainer.step
        stopped = not trainer.done
        if not stopped and (not trainer.history.curve or trainer.history.curve[-1]["step"] != trainer.step):
            trainer.evaluate()
            log.write("evaluation", trainer.history.curve[-1])
            saved = -1
        if saved != trainer.step:
            save_checkpoint(folder, trainer.checkpoint(), run.keep_checkpoints)
    return stopped


def evaluation_is_due(trainer: Trainer) -> bool:
    """Whether this step reached the next of the evenly spread evaluations."""
    n = trainer.run.evaluations
    due = int(trainer.progress * n + 1e-9)
    return due > sum(1 for _ in trainer.history.curve)


def _finish(trainer: Trainer, out: Path, stopped: bool) -> TrainResult:
    if not trainer.history.curve:
        trainer.evaluate()
    paper = trainer.run.paper
    record = {
        "schema": "gatewright.train.v1",
        "title": f"{paper}: one model",
        "command": command_line(),
        "created": now(),
        "environment": environment(trainer.run.device),
        "data": data_record(trainer.corpus, trainer),
        "runs": [
            {
                "seed": trainer.run.seed,
                "sides": [side_record(trainer, kind_of(trainer), f"{paper}, as trained")],
            }
        ],
    }
    write_result(out / "train.json", record)
    write_report(record, out)
    return TrainResult(out, record, stopped)


def kind_of(trainer: Trainer) -> str:
    """Return "sparse" if the model has a router, else "dense"."""
    return "sparse" if trainer.cost.total_parameters != trainer.cost.active_parameters else "dense"


def write_result(path: Path, record: dict[str, Any]) -> None:
    """Write a result file. Raises: RunFailure if a number in it is not finite, since JSON has no word for
    that.
    """
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError as error:
        raise RunFailure(
            f"a figure of {path.name} is not finite ({error}); the run's checkpoints are whole"
        ) from error
    write_atomic(path, text + "\n")
