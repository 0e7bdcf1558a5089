"""What every command shares: one place that prints results, maps errors to exit codes, sets threads."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import GatewrightError

BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell reports for `gatewright papers | head -1`
INTERRUPTED = 130  # 128 + SIGINT


@dataclasses.dataclass(frozen=True)
class Common:
    """Flags of every command."""

    json: bool = False
    """print the result as one JSON object on stdout"""
    debug: bool = False
    """on failure print the whole traceback"""
    from_: Path | None = None
    """read settings from this TOML file; flags given beside it win"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A command's result twice: `data` for --json, `text` for people ("" prints nothing)."""

    data: Mapping[str, Any]
    text: str
    exit_code: int = 0


def flag(field: str) -> str:
    """Return the flag of a field name: `num_experts` -> `num-experts` (`from_` -> `from`)."""
    return field.strip("_").replace("_", "-")


class HelpAsked(Exception):
    """Raised by the parser for --help; carries the text."""


def plain(value: Any) -> Any:
    """Return `value` as what JSON can hold: paths as text, arrays as lists, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain(value.tolist())
    return str(value)


def emit(text: str) -> int:
    """Print a result on stdout and return 0; a reader that has gone away is not an error worth a line."""
    try:
        sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_gone()
    return 0


def fail(line: str, code: int = 1) -> int:
    """Print one error line on stderr and return the exit code."""
    print(f"gatewright: error: {' '.join(line.split())}", file=sys.stderr)
    return code


def shown_live(stdout: TextIO, as_json: bool) -> tuple[Callable[[str], None], Callable[[str], None]]:
    """Return what shows a piece of text at once, nothing where JSON asks for it whole, and what tells a line
    beside it, on stderr.
    """

    def show(piece: str) -> None:
        if not as_json:
            stdout.write(piece)
            stdout.flush()

    return show, lambda line: print(line, file=sys.stderr, flush=True)


def _reader_gone() -> int:
    """Point stdout at nothing, so that the interpreter's own flush at exit stays quiet too."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def run_command(work: Callable[[], Outcome], *, as_json: bool = False, debug: bool = False) -> int:
    """Call `work`, print its outcome, return the exit code.

    While `work` runs, stdout is turned to stderr: what it prints is progress; stdout holds the result alone.
    Errors become one line: GatewrightError by its own code, Ctrl-C 130, a full disk 1, anything unexpected 1.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome = work()
        text = json.dumps(plain(outcome.data), allow_nan=False) if as_json else outcome.text
        return emit(text) or outcome.exit_code
    except HelpAsked as page:
        return emit(str(page))
    except BrokenPipeError:
        return _reader_gone()
    except KeyboardInterrupt:
        return fail("interrupted; whatever was saved stays saved", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    if isinstance(error, GatewrightError):
        return fail(str(error), error.exit_code)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return fail(f"the disk is full{where}; what was saved before is intact; free space and run again")
    what = str(error).strip().splitlines()
    return fail(
        f"{type(error).__name__}: {what[0] if what else 'no message'}; run again with --debug for details"
    )


def command(argv: list[str], work: Callable[[list[str], Common], Outcome]) -> int:
    """Run one command: take the common flags out of `argv`, hand the rest to `work`."""
    as_json, debug = "--json" in argv, "--debug" in argv

    def whole() -> Outcome:
        from .parse import split_common

        common, rest = split_common(argv)
        return work(rest, common)

    return run_command(whole, as_json=as_json, debug=debug)


def prepare_process(threads: int = 0, keep_memory: bool = True) -> bool:
    """Make this process ready for heavy work: torch's CPU threads (0 = its own choice), freed memory kept.
    Return whether it is kept.

    Both are process-wide, so a command does it, never the library. Raises UserError below 0.
    """
    from ..errors import UserError

    if threads < 0:
        raise UserError(f"--threads {threads}; allowed: 1 or more, or 0 for torch's own choice")
    import torch

    from ..training.allocator import keep_big_blocks

    if threads:
        torch.set_num_threads(threads)
    return keep_memory and keep_big_blocks()
