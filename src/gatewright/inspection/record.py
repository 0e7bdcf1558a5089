"""Safe reading of a result: any part of it may be absent, null or not finite, and that is no error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, did_you_mean

RACE = "gatewright.race.v1"
TRAIN = "gatewright.train.v1"
INSPECT = "gatewright.inspect.v1"
SCHEMAS = (RACE, TRAIN, INSPECT)


def lookup(node: Any, *path: str) -> Any:
    """Return the value under a path of keys, or None where any step of the path is absent."""
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def number(node: Any, *path: str) -> float | None:
    """Return a finite number under a path, or None: NaN and infinity count as not recorded."""
    value = lookup(node, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def rows(node: Any, *path: str) -> list[Any]:
    """Return the list under a path; an absent one is empty."""
    value = lookup(node, *path)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []


def table(node: Any, *path: str) -> dict[str, Any]:
    """Return the mapping under a path with its keys as text; an absent one is empty."""
    value = lookup(node, *path)
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def text(node: Any, *path: str) -> str:
    """Return the value under a path as text; an absent or null one is empty."""
    value = lookup(node, *path)
    return "" if value is None else str(value)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the recorded values, or None when there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spread(values: Sequence[float | None]) -> float | None:
    """Return the largest minus the smallest recorded value, or None with fewer than two of them."""
    known = [value for value in values if value is not None]
    return max(known) - min(known) if len(known) > 1 else None


@dataclass(frozen=True)
class Run:
    """One side of one seed."""

    seed: str
    side: Mapping[str, Any]

    @property
    def name(self) -> str:
        return text(self.side, "name") or "unnamed"


@dataclass(frozen=True)
class Record:
    """A result of a race, of a training run or of an inspection, read for display."""

    result: Mapping[str, Any]

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> Record:
        """Check the schema. Raises UserError for a mapping that is no result of this package."""
        schema = text(result, "schema")
        if schema not in SCHEMAS:
            raise UserError(
                f"result schema {schema!r}; allowed are {', '.join(SCHEMAS)}; "
                f"give a race.json, train.json or inspect.json{did_you_mean(schema, SCHEMAS)}"
            )
        return cls(result)

    @property
    def is_race(self) -> bool:
        return text(self.result, "schema") == RACE

    @property
    def is_inspection(self) -> bool:
        return text(self.result, "schema") == INSPECT

    @property
    def title(self) -> str:
        return text(self.result, "title") or ("A race" if self.is_race else "A training run")

    @property
    def command(self) -> str:
        return text(self.result, "command")

    @property
    def runs(self) -> list[Run]:
        """Every side of every seed, in the order of the file."""
        return [
            Run(text(run, "seed"), side)
            for run in rows(self.result, "runs")
            for side in rows(run, "sides")
            if isinstance(side, Mapping)
        ]

    @property
    def seeds(self) -> list[str]:
        return list(dict.fromkeys(run.seed for run in self.runs))

    @property
    def names(self) -> list[str]:
        """Names of the sides, in the order in which they first appear."""
        return list(dict.fromkeys(run.name for run in self.runs))

    def of(self, name: str) -> list[Run]:
        """Return one side's runs, one per seed that holds it."""
        return [run for run in self.runs if run.name == name]

    def first(self, name: str) -> Mapping[str, Any]:
        """Return a side of the first seed that holds it; an unknown name gives an empty one."""
        found = self.of(name)
        return found[0].side if found else {}

    def values(self, name: str, *path: str) -> list[float | None]:
        """Return one number of a side for each of its seeds."""
        return [number(run.side, *path) for run in self.of(name)]

    def is_sparse(self, name: str) -> bool:
        side = self.first(name)
        kind = text(side, "kind")
        return kind == "sparse" if kind else bool(rows(side, "routers"))

    def label(self, name: str) -> str:
        return text(self.first(name), "label") or name

    def short(self, name: str) -> str:
        """Return what a legend has room for: the label, or where that is long the name."""
        label = self.label(name)
        return label if len(label) <= 26 else name

    @property
    def domains(self) -> list[str]:
        """Names of the domains: those of the data first, then any other that a side reports."""
        named = [str(name) for name in rows(self.result, "data", "domains")]
        found = [domain for run in self.runs for domain in table(run.side, "final", "domains")]
        reported = set(found)
        return list(dict.fromkeys([name for name in named if not reported or name in reported] + found))

    @property
    def comparisons(self) -> list[Mapping[str, Any]]:
        return [item for item in rows(self.result, "comparisons") if isinstance(item, Mapping)]

    @property
    def headline(self) -> list[Mapping[str, Any]]:
        """The comparisons that the verdict is about, all seeds: the pair that it names, else the first
        sparse side against its equal-active twin.
        """
        everything = self.comparisons
        names = tuple(text(self.result, "verdict", kind) for kind in ("sparse", "dense"))
        named = [item for item in everything if (text(item, "sparse"), text(item, "dense")) == names]
        active = [item for item in everything if text(item, "against") == "active"]
        chosen = named or active or everything
        if not chosen:
            return []
        pair = (text(chosen[0], "sparse"), text(chosen[0], "dense"), text(chosen[0], "against"))
        return [
            item
            for item in chosen
            if (text(item, "sparse"), text(item, "dense"), text(item, "against")) == pair
        ]
