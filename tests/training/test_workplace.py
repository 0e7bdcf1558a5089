"""The folder that a run owns, the machine it names, and how it is asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gatewright.errors import RunFailure, UserError
from gatewright.training import workplace
from gatewright.training.interrupt import stop_on_signals
from gatewright.training.workplace import command_line, environment, now, own_folder


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path):
    with own_folder(tmp_path / "a/b") as out:
        assert out.is_dir()
        with pytest.raises(UserError, match="another run is writing to"), own_folder(out):
            pass
    with own_folder(out):
        pass


def test_a_lock_goes_with_the_process_that_held_it(tmp_path: Path):
    code = "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")])
    assert done.returncode == -signal.SIGKILL
    with own_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; allowed: a folder"), own_folder(tmp_path / "file"):
        pass
    (tmp_path / "out/.lock").mkdir(parents=True)
    with pytest.raises(RunFailure, match="cannot write to"), own_folder(tmp_path / "out"):
        pass


def test_the_first_signal_asks_and_the_second_interrupts():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_thread_trains_without_handlers():
    asked = []

    def work() -> None:
        with stop_on_signals() as stop:
            asked.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]


def test_the_environment_says_what_a_number_depends_on(monkeypatch: pytest.MonkeyPatch):
    found = environment("cpu")
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())
    assert set(found) == {
        "gatewright",
        "torch",
        "python",
        "threads",
        "processor",
        "cpu_capability",
        "device",
        "commit",
    }
    monkeypatch.setattr(workplace, "__file__", "/workplace.py")
    assert environment("cpu")["commit"] is None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/usr/bin/gatewright", "train", "--seed", "1"], "gatewright train --seed 1"),
        (["/x/gatewright/cli/__main__.py", "race"], "gatewright race"),
        (["/x/script.py", "a"], "script.py a"),
    ],
)
def test_the_command_is_told_as_it_was_typed(argv: list[str], line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == line


def test_the_time_is_utc():
    assert now().endswith("+00:00")
