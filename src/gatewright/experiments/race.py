"""The race: a sparse model and its dense twins on one token stream, in short alternating turns, each
annealed on its own budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewright.data import Corpus
from gatewright.experiments.compare import compare_sides, scaling_curve, small_data_curve, triangle, verdict
from gatewright.experiments.race_run import RaceRun, Side, race_sides
from gatewright.inspection import write_report
from gatewright.training.checkpoint import clear_leftovers, save_checkpoint
from gatewright.training.checks import check_settings, check_text
from gatewright.training.interrupt import StopRequest, stop_on_signals
from gatewright.training.loop import evaluation_is_due, prepare, refuse_used, resume_or_begin, write_result
from gatewright.training.result import data_record, side_record
from gatewright.training.runlog import Progress, RunLog
from gatewright.training.settings_file import check_same_settings, write_settings
from gatewright.training.trainer import Trainer
from gatewright.training.workplace import command_line, environment, now, own_folder


@dataclass(frozen=True)
class RaceResult:
    """`record` is what race.json holds; `stopped` says that the user ended the race before its end."""

    out: Path
    record: dict[str, Any]
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the verdict, every comparison, and where everything is."""
        return {
            "out": str(self.out),
            "stopped": self.stopped,
            "verdict": self.record["verdict"],
            "comparisons": self.record["comparisons"],
            "result": str(self.out / "race.json"),
            "report": str(self.out / "report.html"),
        }

    def to_text(self) -> str:
        """Return the result in a few lines."""
        lines = [self.record["verdict"]["sentence"]]
        if self.stopped:
            lines.insert(0, "stopped before the end, `--resume` continues")
        return "\n".join([*lines, f"report: {self.out / 'report.html'}"])


class Lane:
    """One side on its way: trainer, log, and the steps taken in the latest turn."""

    def __init__(self, side: Side, trainer: Trainer, out: Path, progress: Progress) -> None:
        self.side, self.trainer, self.out = side, trainer, out
        out.mkdir(parents=True, exist_ok=True)
        resume_or_begin(trainer, out, progress)
        self.log = RunLog(out, trainer.step)
        self.saved = trainer.step

    def turn(self, number: int, until: float) -> None:
        """Step to the share `until` of the side's own budget, evaluating where due; note the turn's steps
        and seconds.
        """
        trainer, steps, before = self.trainer, 0, self.trainer.seconds
        while not trainer.done and (trainer.step + 1) / trainer.total_steps <= until + 1e-9:
            record = trainer.advance()
            steps += 1
            if record["step"] % trainer.run.log_every == 0:
                self.log.write("step", record)
            if evaluation_is_due(trainer):
                trainer.evaluate()
                self.log.write("evaluation", trainer.history.curve[-1])
        if steps:
            turn = {"round": number, "steps": steps, "seconds": trainer.seconds - before}
            trainer.history.turns.append(turn)

    def save(self) -> None:
        """Write a checkpoint if there is anything new."""
        if self.saved != self.trainer.step:
            save_checkpoint(
                self.out / "checkpoints", self.trainer.checkpoint(), self.trainer.run.keep_checkpoints
            )
            self.saved = self.trainer.step

    def state(self) -> str:
        """Return "sparse 1.93 bits/byte 71k tokens/s"."""
        curve, log = self.trainer.history.curve, self.trainer.history.log
        bits = (
            f"{curve[-1]['valid_bpb']:.3f} bits/byte"
            if curve
            else f"loss {log[-1]['loss']:.2f}"
            if log and log[-1]["loss"] is not None
            else "..."
        )
        rate = self.trainer.tokens / max(self.trainer.seconds, 1e-9)
        return f"{self.side.name}: {bits}, {rate / 1000:.0f}k tokens/s"


def race(run: RaceRun) -> RaceResult:
    """Run the race and return its result; writes run.toml, race.json, report.html, and each side's own
    folder.

    Turns alternate and rotate, so that a machine that is busy for a while is busy for all sides. Seconds are
    those of optimizer steps alone. Raises: as `training.train`; `resume` continues, every side from its own
    checkpoint.
    """
    out = Path(run.out)
    refuse_used(out, run.resume, "race.json")
    seeds = range(run.first_seed, run.first_seed + run.seeds)
    plans = {seed: race_sides(run, seed) for seed in seeds}
    for side in plans[run.first_seed]:
        check_settings(side.run)
    with Progress("race") as progress:
        corpus = prepare(run, progress.say)
        for side in plans[run.first_seed]:
            check_text(side.run, corpus)
        records, stopped = [], False
        with own_folder(out), stop_on_signals() as stop:
            # Again, now that no other race can begin here.
            refuse_used(out, run.resume, "race.json")
            clear_leftovers(out)
            _keep_settings(run, out, plans[run.first_seed][-1])
            for number, seed in enumerate(seeds):
                with _lanes(plans[seed], corpus, progress) as lanes:
                    _run_seed(run, lanes, stop, progress, number)
                    stopped = any(not lane.trainer.done for lane in lanes)
                    records.append(_seed_record(seed, lanes))
                if stopped:
                    break
            trainer = lanes[0].trainer
            record = race_record(run, records, data_record(corpus, trainer), stopped)
            write_result(out / "race.json", record)
            write_report(record, out)
    return RaceResult(out, record, stopped)


def _keep_settings(run: RaceRun, out: Path, sparse: Side) -> None:
    path = out / "run.toml"
    if run.resume and path.exists():
        check_same_settings(path, run, sparse.run.model if run.model is None else run.model)
    else:
        write_settings(path, run, sparse.run.model if run.model is None else run.model)


@contextmanager
def _lanes(sides: list[Side], corpus: Corpus, progress: Progress) -> Iterator[list[Lane]]:
    with ExitStack() as stack:
        lanes = []
        for side in sides:
            lane = Lane(side, Trainer(side.run, corpus, side.name), Path(side.run.out), progress)
            stack.callback(lane.log.close)
            lanes.append(lane)
        yield lanes


def _run_seed(run: RaceRun, lanes: list[Lane], stop: StopRequest, progress: Progress, number: int) -> None:
    """Advance all lanes in rounds: each round takes every side to the same share of its own budget."""
    longest = max(lane.trainer.total_steps for lane in lanes)
    rounds = -(-longest // run.turn_steps)
    first = int(min(lane.trainer.progress for lane in lanes) * rounds + 1e-9)
    for turn in range(first, rounds):
        share = (turn + 1) / rounds
        start = turn % len(lanes)
        for lane in lanes[start:] + lanes[:start]:
            lane.turn(turn, share)
        done = (number + share) / run.seeds
        progress.update(done, "  ".join(lane.state() for lane in lanes))
        if stop:
            break
        if (turn + 1) % max(1, run.checkpoint_every // run.turn_steps) == 0:
            for lane in lanes:
                lane.save()
    for lane in lanes:
        lane.save()


def _seed_record(seed: int, lanes: list[Lane]) -> dict[str, Any]:
    sides = []
    for lane in lanes:
        if not lane.trainer.history.curve:
            lane.trainer.evaluate()
        own = side_record(lane.trainer, lane.side.kind, lane.side.label)
        own |= {
            "against": lane.side.against,
            "data_fraction": lane.side.data_fraction,
            "turns": lane.trainer.history.turns,
        }
        sides.append(own)
    return {"seed": seed, "sides": sides}


def race_record(
    run: RaceRun, seeds: list[dict[str, Any]], data: dict[str, Any], stopped: bool = False
) -> dict[str, Any]:
    """Return what race.json holds: the sides of every seed, and what they show.

    Only seeds that ran to their end are compared: of a race that was `stopped`, all but the last.
    """
    ended = seeds[:-1] if stopped else seeds
    comparisons = [c for one in ended for c in compare_sides(one)]
    return {
        "schema": "gatewright.race.v1",
        "title": f"{run.paper}: sparse against dense",
        "command": command_line(),
        "created": now(),
        "environment": environment(run.device),
        "data": data,
        "runs": seeds,
        "comparisons": comparisons,
        "verdict": verdict(comparisons, run.seeds),
        "scaling": scaling_curve(ended) if run.experts and ended else None,
        "small_data": small_data_curve(ended) if run.data_fraction and ended else None,
        "triangle": triangle(ended) if run.triangle and ended else None,
    }
