"""What a check found: how many cases were run, each difference in words, and what would explain them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# How far a number may be off, by the dtype that it was computed from.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Difference:
    """One case whose result is not the expected one: what came instead, and what should have come."""

    case: str
    found: str
    expected: str = ""

    def __str__(self) -> str:
        return f"{self.case}: {self.found}" + (f"; expected {self.expected}" if self.expected else "")


class Mismatch(AssertionError):
    """A result that is not the expected one; the text names the case and both."""

    def __init__(self, case: str, found: str = "", expected: str = "") -> None:
        self.difference = Difference(case, found, expected)
        super().__init__(str(self.difference) if found else case)


@dataclass(frozen=True)
class Report:
    """What came of all cases: `subject` was held to `cases` of them, `differences` holds the first of each
    case that differs, `diagnosis` the known mistakes and conventions that explain all of them.
    """

    subject: str
    cases: int
    differences: tuple[Difference, ...] = ()
    diagnosis: tuple[str, ...] = ()

    @property
    def passed(self) -> int:
        """How many cases have the expected result."""
        return self.cases - len(self.differences)

    @property
    def ok(self) -> bool:
        """Whether all have."""
        return not self.differences

    def __str__(self) -> str:
        head = f"{self.subject}: {self.passed} of {self.cases} cases pass"
        lines = [f"  differs: {difference}" for difference in self.differences]
        return "\n".join([head, *lines, *(f"  explained by: {line}" for line in self.diagnosis)])


class Log:
    """The cases of one check as they are run. `report` keeps what a function raises as a difference."""

    def __init__(self, subject: str, report: bool) -> None:
        self.subject, self.report = subject, report
        self.cases = 0
        self.differences: list[Difference] = []

    def run(self, case: str, action: Callable[[], None]) -> None:
        """Run one case; keep the Mismatch that it raises."""
        self.cases += 1
        try:
            action()
        except Mismatch as fault:
            self.differences.append(fault.difference)
        except Exception as error:
            if not self.report:
                raise
            first = (str(error).splitlines() or [""])[0]
            self.differences.append(Difference(case, f"raised {type(error).__name__}: {first}"))

    def finish(self, diagnosis: Sequence[str]) -> Report:
        """Return the Report, or raise Mismatch where differences are not to be returned."""
        report = Report(self.subject, self.cases, tuple(self.differences), tuple(diagnosis))
        if report.ok or self.report:
            return report
        more = len(report.differences) - 1
        rest = [f"({more} more of {report.cases} cases differ; report=True lists them)"] if more else []
        rest += [f"explained by: {line}" for line in report.diagnosis]
        raise Mismatch("\n".join([str(report.differences[0]), *rest]))


def near(found: float, expected: float, tolerance: float) -> bool:
    """Whether two numbers agree, relative to the expected one above 1; a NaN agrees with none."""
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))
