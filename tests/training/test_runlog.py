"""What a run writes of itself: log.jsonl, TensorBoard's file, the history, the line of progress."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from gatewright.errors import RunFailure
from gatewright.training.history import History
from gatewright.training.runlog import Progress, RunLog, duration, load_line


def record(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "step_seconds": 0.5, "skipped": False, **more}


def counts(*values: int, kept: tuple[int, ...] | None = None) -> dict[str, torch.Tensor]:
    return {"counts": torch.tensor(values), "kept": torch.tensor(kept or values)}


def test_a_log_record_holds_means_since_the_last():
    history = History()
    for step, loss in enumerate((3.0, 1.0, 5.0, 6.0, 1.0), start=1):
        history.note_step(record(step, loss, gradient_norm=step / 10), {}, every=2)
    assert [(entry["step"], entry["loss"], entry["step_seconds"]) for entry in history.log] == [
        (2, 2.0, 0.5),
        (4, 5.5, 0.5),
    ]
    # What is no mean is the last step's.
    assert [entry["gradient_norm"] for entry in history.log] == [0.2, 0.4]
    assert history.recent["steps"] == 1
    assert history.recent["loss"] == 1.0


def test_load_and_drops_are_shares_of_the_assignments_since_the_last_record():
    history = History()
    history.note_step(record(1), {"r": counts(3, 1, 0, 0, kept=(2, 1, 0, 0))}, every=2)
    history.note_step(record(2), {"r": counts(1, 1, 2, 0, kept=(1, 1, 1, 0))}, every=2)
    history.note_step(record(3), {"r": counts(0, 0, 0, 4)}, every=2)
    history.note_step(record(4), {"r": counts(0, 0, 0, 4)}, every=2)
    # 4 of 8, 2 of 8, 2 of 8, 0; two of eight dropped.
    assert history.load == {"r": [[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]}
    assert history.dropped == {"r": [0.25, 0.0]}
    # Busiest expert: all of the load where an even share is 1/4; three idle.
    assert load_line(history) == "load 4.00, idle 3, drop 0.0 %"
    assert load_line(History()) == ""


def test_the_history_goes_through_json_unchanged():
    history = History()
    history.note_step(record(1, 1 / 3), {"r": counts(1, 2)}, every=2)
    history.note_step(record(2, 0.1), {"r": counts(1, 2)}, every=2)
    history.note_step(record(3, 0.2), {"r": counts(5, 2)}, every=2)
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history


def events(folder: Path) -> list[Event]:
    (path,) = folder.iterdir()
    reader = PyRecordReader_New(str(path))
    found = []
    while True:
        try:
            reader.GetNext()
        except Exception:
            return found
        found.append(Event.FromString(reader.record()))


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path):
    log = RunLog(tmp_path, step=4)
    log.write("step", record(5, 2.5, note="text", count=3))
    log.write("evaluation", {"step": 6, "valid_bpb": 1.25, "domains": {"law": 1.0, "code": 1.5}})
    # Readable while the run goes on: nothing waits in this process.
    version, start, step, evaluation = events(tmp_path / "tensorboard")
    log.close()
    assert version.file_version == "brain.Event:2"
    # Whatever a killed run logged from step 5 on is superseded.
    assert (start.step, start.session_log.status) == (5, SessionLog.START)
    assert step.step == 5
    assert {v.tag: v.simple_value for v in step.summary.value} == {
        "step/loss": 2.5,
        "step/step_seconds": 0.5,
        "step/count": 3.0,
    }
    assert {v.tag: v.simple_value for v in evaluation.summary.value} == {
        "evaluation/valid_bpb": 1.25,
        "evaluation/bits per byte/law": 1.0,
        "evaluation/bits per byte/code": 1.5,
    }


def test_what_is_not_finite_is_null_in_the_log_and_absent_from_tensorboard(tmp_path: Path):
    log = RunLog(tmp_path)
    log.write("step", record(1, math.nan, gradient_norm=math.inf))
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    held = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert held["loss"] is None
    assert held["gradient_norm"] is None
    assert [v.tag for v in events(tmp_path / "tensorboard")[-1].summary.value] == ["step/step_seconds"]


def test_a_new_run_begins_its_log_anew_and_a_resumed_one_cuts_it(tmp_path: Path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write("step", record(step))
    log.close()
    RunLog(tmp_path, step=2).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    RunLog(tmp_path, step=0).close()
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/tensorboard").write_text("in the way")
    with pytest.raises(RunFailure, match=r"cannot write the log in .*the checkpoints are whole; free space"):
        RunLog(tmp_path / "a")
    log = RunLog(tmp_path / "b")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._board, "add", full)
    with pytest.raises(RunFailure, match="No space left on device"):
        log.write("step", record(1))
    log.close()


def test_progress_off_a_terminal_is_plain_lines_now_and_then():
    stream = io.StringIO()
    with Progress("olmoe", stream, every=1000.0) as progress:
        progress.update(0.1, "loss 3")
        progress.update(0.5, "loss 2")
        progress.say("step 5: 1.2 bits per byte")
        progress.update(1.0, "loss 1")
    first, said, last = stream.getvalue().splitlines()
    assert first == "olmoe:  10.0 %  loss 3"
    assert said == "step 5: 1.2 bits per byte"
    assert last.startswith("olmoe: 100.0 %  left 0:00  loss 1")


def test_the_time_left_is_that_at_the_pace_since_the_start(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 100.0, 130.0])
    monkeypatch.setattr("gatewright.training.runlog.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress("run", stream, every=0.0)
    # Resumed at 40 %: 10 % in 30 s leave 50 % for 150 s.
    progress.update(0.4, "a")
    progress.update(0.5, "b")
    assert stream.getvalue().splitlines()[1] == "run:  50.0 %  left 2:30  b"


def test_on_a_terminal_a_bar_is_drawn():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("olmoe", stream) as progress:
        progress.update(0.25, "loss 3 [not markup]")
        progress.say("said [not markup]")
    assert "said [not markup]" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.9, "1:01"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text
