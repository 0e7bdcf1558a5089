"""The errors that gatewright raises on purpose, each with the exit code that a command ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GatewrightError(Exception):
    """An expected failure: one line that says what happened. Commands print it and exit with `exit_code`."""

    exit_code = 1


class UserError(GatewrightError, ValueError):
    """The user's mistake: the line says what was given, what is allowed and what to do. Exit code 2."""

    exit_code = 2


class RunFailure(GatewrightError, RuntimeError):
    """A failure of the machine or of training (full disk, non-finite loss). Exit code 1; nothing saved is "
    "lost."""

    exit_code = 1


class Diverged(RunFailure):
    """A loss or gradient that is not finite; the weights are those of the step before."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest allowed word, or "" when none is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
