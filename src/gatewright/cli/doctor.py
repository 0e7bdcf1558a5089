"""`gatewright doctor`: is this installation ready, and what would make it better?"""

from __future__ import annotations

from .run import Common, Outcome, command


def main(argv: list[str]) -> int:
    """Run the command; exit code 1 when something that matters fails."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Check everything and return the report."""
    from ..doctor import doctor
    from .parse import settings_from

    settings_from(argv, prog="gatewright doctor", toml=common.from_)
    found = doctor()
    return Outcome(found.to_dict(), found.to_text(), exit_code=0 if found.ok else 1)
