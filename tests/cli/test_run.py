"""What every command shares: exit codes, one line on stderr, one JSON object on stdout, a fast --help."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gatewright.cli import COMMANDS, main
from gatewright.cli.run import Outcome, command, prepare_process, run_command
from gatewright.errors import RunFailure, UserError


def gatewright(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gatewright.cli", *argv], capture_output=True, text=True, timeout=60
    )


def raising(error: BaseException):
    def work() -> Outcome:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            UserError("K is 9; 1..8 are allowed; lower it"),
            2,
            "gatewright: error: K is 9; 1..8 are allowed; lower it",
        ),
        (RunFailure("loss is NaN"), 1, "gatewright: error: loss is NaN"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "the disk is full while writing /x/y"),
        (ValueError("first\nsecond"), 1, "ValueError: first; run again with --debug"),
        (ZeroDivisionError(), 1, "ZeroDivisionError: no message"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error, code, line, capsys):
    assert run_command(raising(error)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert line in err
    assert "Traceback" not in err


def test_debug_lets_the_error_through():
    with pytest.raises(ValueError, match="boom"):
        run_command(raising(ValueError("boom")), debug=True)


def test_json_is_the_only_thing_on_stdout(capsys):
    def work() -> Outcome:
        print("step 1 of 2")
        return Outcome(
            {"a": np.float32(1.5), "b": float("nan"), "c": Path("x"), "d": np.arange(2)}, "a table"
        )

    assert run_command(work, as_json=True) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1.5, "b": None, "c": "x", "d": [0, 1]}
    assert out.count("\n") == 1
    assert err == "step 1 of 2\n"


def test_text_is_printed_when_json_is_not_asked(capsys):
    assert run_command(lambda: Outcome({}, "a table", exit_code=1)) == 1
    assert capsys.readouterr().out == "a table\n"


def test_threads_below_zero_are_refused_and_a_count_is_set(monkeypatch):
    import torch

    kept: list[bool] = []
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: kept.append(True))
    before = torch.get_num_threads()
    try:
        with pytest.raises(UserError, match=r"--threads -1; allowed: 1 or more, or 0"):
            prepare_process(-1)
        prepare_process(before + 1)
        assert torch.get_num_threads() == before + 1
        prepare_process()
        assert torch.get_num_threads() == before + 1
        assert len(kept) == 2
    finally:
        torch.set_num_threads(before)


def test_a_command_gets_the_common_flags_and_the_rest(capsys):
    def work(argv, common) -> Outcome:
        return Outcome({"argv": argv, "json": common.json}, "")

    assert command(["a", "--json", "--b", "c"], work) == 0
    assert json.loads(capsys.readouterr().out) == {"argv": ["a", "--b", "c"], "json": True}


def test_unknown_command_and_flag_say_what_was_meant(capsys):
    assert main(["rase"]) == 2
    assert "unknown command 'rase'; did you mean 'race'" in capsys.readouterr().err
    assert main(["--jsn"]) == 2
    assert "unknown flag '--jsn'" in capsys.readouterr().err


def test_overview_lists_every_command_and_each_has_a_module(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    folder = Path(sys.modules["gatewright.cli"].__file__).parent
    for name in COMMANDS:
        assert f"  {name} " in text
        assert (folder / f"{name}.py").is_file(), name


def test_help_is_fast_and_imports_no_torch():
    # Processor time, not the clock: a busy machine must not decide it. Importing torch alone takes longer.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = gatewright("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("usage: gatewright")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    code = "import sys; from gatewright.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


def test_a_reader_that_goes_away_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        argv = [sys.executable, "-m", "gatewright.cli", "--help"]
        done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""
