"""Runs commands in forked children and kills them: torch is imported once, so that a trial costs no start.

One JSON request per line on stdin, one JSON reply per line on stdout. A request holds `argv` and may hold:
`kill_after` (seconds until SIGKILL), `kill_event` (SIGKILL before the n-th file event, from 1), `signal_at`
([signal name, step]: the process gets it in that step), `limit` (largest file in bytes), `report` (write one,
with the maps that it shows).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gatewright.experiments.race as race
import gatewright.training.checkpoint as checkpoint
import gatewright.training.loop as loop
import gatewright.training.result as result
from gatewright.cli import main
from gatewright.training.trainer import Trainer

# What a run would load on its way.
LATE = (
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
    "tyro",
)


def count_events(fatal: int | None, at: Path) -> None:
    """Count the calls that change or flush files, in the file `at`; SIGKILL before number `fatal`."""
    seen = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            at.write_text(str(seen))
            return call(*args, **kwargs)

        return wrapper

    for module, name in (
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (checkpoint, "save_file"),
    ):
        setattr(module, name, counted(getattr(module, name)))


def signal_in_step(name: str, step: int) -> None:
    """Send this process a signal in the middle of its `step`-th step."""
    inner = Trainer._gradients

    def with_signal(self: Trainer, batch: Any) -> Any:
        if self.step + 1 == step:
            os.kill(os.getpid(), getattr(signal, name))
        return inner(self, batch)

    Trainer._gradients = with_signal  # type: ignore[method-assign]


def child(request: dict[str, Any], folder: Path, outputs: list[int]) -> None:
    """Run one command and leave; never returns."""
    code = 70
    with contextlib.suppress(BaseException):
        # Pipes, since a limit on the size of files is not to cut what the command says.
        for descriptor, output in enumerate(outputs, start=1):
            os.dup2(output, descriptor)
        os.environ["GATEWRIGHT_CACHE"] = request["cache"]
        if not request.get("report"):
            loop.write_report = race.write_report = lambda *_: None  # type: ignore[assignment]
            result.routing_record = lambda _: {"specialisation": None, "token_view": None}
        if "kill_event" in request:
            count_events(request["kill_event"], folder / "events")
        if "signal_at" in request:
            signal_in_step(*request["signal_at"])
        if "limit" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        code = main(request["argv"])
        sys.stdout.flush()
    os._exit(code)


def serve(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fork a child for one request and return how it ended (a signal as a negative code)."""
    started = time.perf_counter()
    pipes = [os.pipe(), os.pipe()]
    process = os.fork()
    if not process:
        child(request, folder, [output for _, output in pipes])
    for _, output in pipes:
        os.close(output)
    if "kill_after" in request:
        time.sleep(request["kill_after"])
        os.kill(process, signal.SIGKILL)
    _, status, used = os.wait4(process, 0)
    events = folder / "events"
    said = []
    for pipe, _ in pipes:
        with os.fdopen(pipe) as stream:
            said.append(stream.read())
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.perf_counter() - started,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "stdout": said[0],
        "stderr": said[1],
        "events": int(events.read_text()) if events.exists() else 0,
    }


if __name__ == "__main__":
    for name in LATE:
        importlib.import_module(name)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        own = Path(sys.argv[1]) / str(number)
        own.mkdir(parents=True)
        print(json.dumps(serve(json.loads(line), own)), flush=True)
