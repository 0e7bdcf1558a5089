"""kill -9 at any moment: --resume continues bit for bit, and log.jsonl reads as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gatewright.training.checkpoint import verify_checkpoint
from tests.training.runs import final_digest, read_log, train_argv

Server = Callable[..., dict[str, Any]]
STEPS = 40
KILLED = -signal.SIGKILL


def finish(server: Server, argv: list[str]) -> None:
    reply = server([*argv, "--resume"])
    assert reply["code"] == 0, reply["stderr"]


def golden_run(
    server: Server, data: list[str], out: Path, steps: int, *more: str, **request: Any
) -> tuple[str, list[Any], Any]:
    """Return digest and log of the run that nothing disturbs, and the server's reply."""
    reply = server(train_argv(data, out, steps, *more), **request)
    assert reply["code"] == 0, reply["stderr"]
    log = read_log(out)
    assert [line["step"] for line in log if line["kind"] == "step"] == list(range(1, steps + 1))
    assert [line["step"] for line in log if line["kind"] == "evaluation"] == [
        steps * n // 4 for n in (1, 2, 3, 4)
    ]
    return final_digest(out), log, reply


def assert_golden(out: Path, golden: tuple[str, list[Any], Any]) -> None:
    assert final_digest(out) == golden[0]
    assert read_log(out) == golden[1]
    assert [p.name for p in out.rglob(".*") if p.name != ".lock"] == []


@pytest.mark.timeout(600)
def test_twenty_kills_at_random_times(server: Server, data: list[str], tmp_path: Path):
    golden = golden_run(server, data, tmp_path / "golden", STEPS)
    draw, killed, begun, span = random.Random(20), 0, 0, golden[2]["seconds"]
    for _ in range(80):
        out = tmp_path / "trial"
        reply = server(train_argv(data, out, STEPS), kill_after=draw.uniform(0, span))
        if reply["code"] == KILLED:
            killed += 1
            far = (out / "checkpoints").exists()
            begun += far
            # The machine may have become slower or faster since the run that gave the span.
            span *= 1.0 if far else 1.2
            finish(server, train_argv(data, out, STEPS))
            assert_golden(out, golden)
        else:
            span = reply["seconds"]
        shutil.rmtree(out, ignore_errors=True)
        if killed == 20:
            break
    assert killed == 20
    assert begun > 0, "no kill came after the first checkpoint"


def test_a_chain_of_kills(server: Server, data: list[str], tmp_path: Path):
    golden = golden_run(server, data, tmp_path / "golden", STEPS)
    out, draw = tmp_path / "chain", random.Random(5)
    # Each falls into the steps after another checkpoint (every 7 steps), or before the first.
    for step in (draw.randint(first, first + 6) for first in (1, 8, 15, 15, 29)):
        reply = server(train_argv(data, out, STEPS, "--resume"), signal_at=["SIGKILL", step])
        assert reply["code"] == KILLED
    finish(server, train_argv(data, out, STEPS))
    assert_golden(out, golden)


@pytest.mark.timeout(600)
def test_kills_before_every_file_event_of_a_start_a_save_and_an_end(
    server: Server, data: list[str], tmp_path: Path
):
    few = ["--checkpoint-every", "3"]
    golden = golden_run(server, data, tmp_path / "golden", 8, *few, kill_event=0)
    # tokenizer.json, run.toml, log.jsonl and train.json take 2 events each; a save 11: three tensor files,
    # six fsyncs of files and folder, the rename, the fsync of its parent; the third save removes the first.
    assert golden[2]["events"] == 2 * 4 + 11 * 3 + 1
    for event in (*range(1, 8), *range(29, 43)):
        out = tmp_path / f"event{event}"
        assert server(train_argv(data, out, 8, *few), kill_event=event)["code"] == KILLED
        for held in (out / "checkpoints").glob("step-*"):
            assert verify_checkpoint(held) is None
        finish(server, train_argv(data, out, 8, *few))
        assert_golden(out, golden)
