"""`bench_step`: one whole training step of a sparse model and of its dense twin, and where its time goes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatewright.data import Corpus, open_corpus
from gatewright.errors import UserError
from gatewright.experiments.twin import dense_twin
from gatewright.kernels import native
from gatewright.measuring.grid import Dtype
from gatewright.measuring.memory import check_memory_can_be_measured
from gatewright.measuring.parts import model_labels, time_parts
from gatewright.measuring.pictures import draw_step
from gatewright.measuring.record import refusal
from gatewright.measuring.roofline import Machine, measure_machine
from gatewright.measuring.rounds import Turn, check_rounds, middle, paired, spread, time_rounds
from gatewright.measuring.run import Allocator
from gatewright.measuring.step_floor import floor_seconds, work_of_parts
from gatewright.measuring.step_memory import step_memory
from gatewright.measuring.step_result import SCHEMA, StepResult, step_goals, told
from gatewright.papers.registry import get_text_paper
from gatewright.training import TrainRun
from gatewright.training.checkpoint import write_atomic
from gatewright.training.checks import check_settings, check_text
from gatewright.training.run import Recompute
from gatewright.training.runlog import Progress
from gatewright.training.trainer import Trainer
from gatewright.training.workplace import command_line, environment, now, own_folder

WARM_UPS, PROFILED = 3, 5
PLAIN, COMPILED = "_plain", "_compiled"


@dataclass(frozen=True)
class StepRun:
    """Time one training step of a sparse model and of its dense twin, and profile it by part."""

    paper: str = "mixtral"
    """id of the paper whose model is timed"""
    model: Any = None
    """the paper's Settings; none means its small default"""
    data: tuple[str, ...] = ()
    """files and folders to train on, each a named domain; none means the default corpus"""
    tokenizer: str = "bytes"
    """bytes, bpe:N (a byte-level BPE of N ids, trained on this text), or a path to a tokenizer.json"""
    batch_tokens: int = 4096
    """tokens per optimizer step"""
    accumulation: int = 1
    """micro-batches that a step's tokens are split into"""
    recompute: Recompute = "none"
    """what the backward pass computes again instead of keeping it: none, or blocks"""
    precisions: tuple[Dtype, ...] = ("fp32", "bf16")
    """of the matmuls; weights and optimizer stay fp32"""
    plain: bool = True
    """time both models with torch's own operators too, to see what this toolkit's gain"""
    compiled: bool = False
    """time both models with every block through torch.compile too; what that takes at first is told apart"""
    memory: bool = False
    """measure each model's peak memory too, against its floor, in a process of its own"""
    steps: int = 2
    """optimizer steps per turn"""
    rounds: int = 15
    """rounds, 11 or more; in each of them every side has one turn"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    allocator: Allocator = "kept"
    """big blocks of freed memory stay in the process (kept) or go back to the system (default)"""
    out: str = "runs/bench"
    """folder of the result: step.json and pictures"""

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        if not self.precisions:
            raise UserError("precisions is empty; allowed: fp32, bf16 or both")
        if self.steps < 1:
            raise UserError(f"steps {self.steps}; allowed: 1 or more")
        if self.memory:
            check_memory_can_be_measured()


def bench_step(run: StepRun, say: Callable[[str], None] | None = None) -> StepResult:
    """Time whole steps of both models, sides alternating, profile their parts, write `step.json` and
    pictures, and return the result.

    Threads and allocator are the process's own. Args: `say` takes a line of progress; None writes to stderr.
    Raises: UserError for settings or text that cannot work, or if the folder is in use.
    """
    say = say or Progress("bench").say
    plans = {precision: dict(side_runs(run, precision)) for precision in dict.fromkeys(run.precisions)}
    for own in plans[run.precisions[0]].values():
        check_settings(own)
    with own_folder(Path(run.out)) as out:
        corpus = open_corpus(run.data, tokenizer=run.tokenizer, seed=0, progress=say)
        check_text(next(iter(plans[run.precisions[0]].values())), corpus)
        machine = measure_machine(run.precisions, run.rounds)
        rows = []
        for precision, runs in plans.items():
            row = measure_row(run, precision, runs, corpus, machine)
            for name, own in runs.items() if run.memory else ():
                found = step_memory(own, torch.get_num_threads())
                row["sides"][name]["memory"] = found and found.to_dict()
            rows.append(row)
            say(told(row))
        record = {
            "schema": SCHEMA,
            "command": command_line(),
            "created": now(),
            "environment": environment("cpu"),
            "settings": {
                "paper": run.paper,
                "batch_tokens": run.batch_tokens,
                "accumulation": run.accumulation,
                "recompute": run.recompute,
                "rounds": run.rounds,
                "steps": run.steps,
                "allocator": run.allocator,
                "native": native.status().reason,
            },
            "machine": machine.to_dict(),
            "rows": rows,
            "goals": [goal for row in rows for goal in step_goals(row)],
        }
        write_atomic(out / "step.json", json.dumps(record, indent=1) + "\n")
        pictures = draw_step(rows, out)
    return StepResult(record, (str(out / "step.json"), *map(str, pictures)))


def side_runs(run: StepRun, precision: Dtype) -> Iterator[tuple[str, TrainRun]]:
    """Yield the dense twin's and the sparse model's training run."""
    model = get_text_paper(run.paper).Settings() if run.model is None else run.model
    shared = {
        field.name: getattr(run, field.name)
        for field in dataclasses.fields(StepRun)
        if field.name in {own.name for own in dataclasses.fields(TrainRun)} - {"model", "out"}
    }
    for name, settings in (("dense", dense_twin(run.paper, model)), ("sparse", model)):
        yield name, TrainRun(**shared, model=settings, precision=precision)


def measure_row(
    run: StepRun, precision: Dtype, runs: Mapping[str, TrainRun], corpus: Corpus, machine: Machine
) -> dict[str, Any]:
    """Return one precision's row: raw seconds of every side's step, ratios, and each side's parts."""
    with torch.random.fork_rng(devices=[]):
        trainers = {name: Trainer(own, corpus, name) for name, own in runs.items()}
        plain = run.plain and native.is_ready()
        if plain:
            trainers |= {name + PLAIN: Trainer(own, corpus, name) for name, own in runs.items()}
        start = {}
        for name, own in runs.items() if run.compiled else ():
            trainers[name + COMPILED], start[name + COMPILED] = _compiled(own, corpus, name)
        turns = {name: Turn(_turn(name, trainer, run.steps), _nothing) for name, trainer in trainers.items()}
        time_rounds(turns, WARM_UPS)
        raw = time_rounds(turns, run.rounds)
        seconds = {name: [taken / run.steps for taken in own] for name, own in raw.items()}
        sides = {name: _side(trainers[name], precision, machine) for name in ("sparse", "dense")}
    return {
        "precision": precision,
        "refused": refusal(spread(seconds["dense"])),
        "ratios": {
            "sparse_over_dense": paired(seconds["sparse"], seconds["dense"])._asdict(),
            **{
                f"{name}_gain": paired(seconds[name + PLAIN], seconds[name])._asdict() if plain else None
                for name in runs
            },
            **{
                name + COMPILED: paired(seconds[name + COMPILED], seconds[name])._asdict()
                for name in runs
                if name + COMPILED in seconds
            },
        },
        "start_seconds": start,
        "step_seconds": {name: middle(own)._asdict() for name, own in seconds.items()},
        "sides": sides,
        "seconds": seconds,
    }


def _compiled(run: TrainRun, corpus: Corpus, name: str) -> tuple[Trainer, float]:
    """Return a trainer whose blocks are compiled, and the seconds of its first step, which compiles them."""
    trainer = Trainer(run, corpus, name)
    model: Any = trainer.model
    for block in model.layers:
        block.compile()
    started = time.perf_counter()
    trainer.advance()
    return trainer, time.perf_counter() - started


def _turn(name: str, trainer: Trainer, steps: int) -> Callable[[], None]:
    def advance() -> None:
        for _ in range(steps):
            trainer.advance()

    def plainly() -> None:
        with native.left_out():
            advance()

    return plainly if name.endswith(PLAIN) else advance


def _nothing() -> None:
    """What a step leaves behind is the next one's."""


def _side(trainer: Trainer, precision: Dtype, machine: Machine) -> dict[str, Any]:
    """Return what a side is, and its parts: seconds forward and backward under the profiler, and floors."""
    model: Any = trainer.model
    labels = [
        *model_labels(model),
        (trainer.stream, "batch", "data"),
        (trainer, "objective", "loss"),
        (trainer.optimizer, "total_norm", "optimizer"),
        (trainer.optimizer, "step", "optimizer"),
    ]
    times = time_parts(trainer.advance, PROFILED, labels)
    work = work_of_parts(model, trainer.step_tokens, precision, averaged=trainer.average is not None)
    parts = {
        part: {**own, "floor": floor_seconds(work[part], machine) if part in work else None}
        for part, own in times.items()
        if part in work or sum(own.values()) > 0
    }
    return {
        "active_parameters": trainer.cost.active_parameters,
        "total_parameters": trainer.cost.total_parameters,
        "tokens_per_step": trainer.step_tokens,
        "tokens_per_expert": trainer.tokens_per_expert,
        "parts": parts,
    }
