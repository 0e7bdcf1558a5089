"""Experiments: the race of a sparse model against its dense twin, and the recorded reproductions."""

from gatewright.experiments.race_run import RaceRun, Side, race_sides
from gatewright.experiments.twin import dense_twin

__all__ = ["TARGETS", "RaceResult", "RaceRun", "Side", "dense_twin", "race_sides", "reproduce", "run_race"]


def __getattr__(name: str) -> object:
    # Running brings the report's code along: loaded when something runs, not when its settings are parsed.
    if name in ("reproduce", "TARGETS"):
        from gatewright.experiments import registry

        return getattr(registry, name)
    if name in ("run_race", "RaceResult"):
        from gatewright.experiments import race

        return race.race if name == "run_race" else race.RaceResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
