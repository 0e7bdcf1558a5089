"""Where a run writes what happens: JSON lines and TensorBoard always; a progress bar on a terminal, plain
lines off it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from gatewright.errors import RunFailure
from gatewright.training.checkpoint import write_atomic
from gatewright.training.history import History, finite


def duration(seconds: float) -> str:
    """Return seconds as "1:02:03" or "2:03"."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def load_line(history: History) -> str:
    """Return "load 1.43, idle 0, drop 0.0 %": the busiest expert's load over the mean, experts without a
    token and the share of dropped assignments, over all routers since the last record; "" if dense.
    """
    if not history.load:
        return ""
    latest = [shares[-1] for shares in history.load.values()]
    worst = max(max(shares) * len(shares) for shares in latest)
    idle = sum(share == 0 for shares in latest for share in shares)
    dropped = max(values[-1] for values in history.dropped.values())
    return f"load {worst:.2f}, idle {idle}, drop {100 * dropped:.1f} %"


class RunLog:
    """Writes records of one model to OUT/log.jsonl and OUT/tensorboard.

    Raises: RunFailure where they cannot be written (full disk).
    """

    def __init__(self, out: Path, step: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.jsonl"
        kept = _lines_up_to(self.path, step)
        # Beside and renamed: a kill in the middle must not cost lines that the checkpoint counts as written.
        write_atomic(self.path, "".join(kept))
        with _failing_as_run(out):
            self._board = _Board(out / "tensorboard", step + 1)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Add one record; `kind` is "step" or "evaluation". What is not finite becomes null in log.jsonl."""
        record = finite(record)
        scalars = {f"{kind}/{k}": v for k, v in record.items() if k != "step" and type(v) in (int, float)}
        domains = record.get("domains", {})
        scalars |= {f"{kind}/bits per byte/{domain}": bits for domain, bits in domains.items()}
        with _failing_as_run(self.path.parent):
            self._file.write(json.dumps({"kind": kind, **record}, allow_nan=False) + "\n")
            self._board.add(record["step"], scalars)

    def close(self) -> None:
        """Close both. Every record was handed to the system when it was written: nothing is left to fail."""
        for file in (self._file, self._board):
            with suppress(OSError):
                file.close()


@contextmanager
def _failing_as_run(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailure(
            f"cannot write the log in {out}: {error.strerror or error}; the checkpoints are whole; free "
            "space, then --resume"
        ) from error


class _Board:
    """An event file for TensorBoard, written as it comes: torch's SummaryWriter writes from a thread, "
    "where an error is a traceback."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The time comes first: TensorBoard reads the files of a folder in the order of their names.
        tail = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        # Unbuffered: one write call per part of a record, so that nothing waits in this process.
        self._file = (folder / f"events.out.tfevents.{int(time.time()):010d}.{tail}").open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        self._put(file_version="brain.Event:2")
        # Whatever an earlier process logged from this step on is superseded.
        self._put(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def _put(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each named curve."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._put(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Lines of steps that the checkpoint knows: what a killed run logged after it will be logged again."""
    if step == 0 or not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    return kept


class Progress:
    """One line of state, redrawn on a terminal and printed every `every` seconds off it; always on stderr."""

    def __init__(self, title: str, stream: TextIO | None = None, every: float = 10.0) -> None:
        self.title, self.stream, self.every = title, stream or sys.stderr, every
        self.live = self.stream.isatty()
        self._last, self._started = -math.inf, time.monotonic()
        self._start_share: float | None = None
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[state]}"),
            )
            self._bar = RichProgress(*columns, console=Console(file=self.stream))
            self._task = self._bar.add_task(self.title, total=1.0, state="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line of its own."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    def update(self, share: float, state: str) -> None:
        """Show that `share` (0 to 1) is done; the time left is that at the pace since the start."""
        now = time.monotonic()
        if self._start_share is None:
            self._start_share, self._started = share, now
        done = share - self._start_share
        left = (now - self._started) * (1 - share) / done if done > 0 else math.nan
        # What fits into 80 columns comes first: share, time left, loss.
        time_left = "" if math.isnan(left) else f"left {duration(left)}  "
        state = f"{100 * share:5.1f} %  {time_left}{state}"
        if self._bar is not None:
            self._bar.update(self._task, completed=share, state=state)
        elif now - self._last >= self.every or share >= 1:
            self._last = now
            print(f"{self.title}: {state}", file=self.stream, flush=True)
