"""The folder that a run owns while it lasts, and the machine that it runs on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gatewright.errors import RunFailure, UserError

if os.name == "posix":
    import fcntl


@contextmanager
def own_folder(out: Path) -> Iterator[Path]:
    """Hold `out` for one process. Raises: UserError if another run has it; RunFailure if it cannot be
    made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except FileExistsError:
        raise UserError(
            f"{out} is a file; allowed: a folder, new or of an earlier run; give another --out"
        ) from None
    except OSError as error:
        raise RunFailure(f"cannot write to {out}: {error.strerror or error}; give another --out") from error
    with lock:
        if os.name == "posix":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another run is writing to {out}; wait for it, or give another --out"
                ) from None
        yield out


def environment(device: str) -> dict[str, Any]:
    """Return what a result depends on besides its settings."""
    from gatewright import __version__

    return {
        "gatewright": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, marked "+" where it has changes; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5
        )
        if commit.returncode:
            return None
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "."],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """Return the command that started this process, as a user would type it."""
    name = Path(sys.argv[0]).name
    return " ".join(["gatewright" if name in ("gatewright", "__main__.py") else name, *sys.argv[1:]])
