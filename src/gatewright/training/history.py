"""What a run remembers of itself: losses, evaluations, expert load and drops over time. Saved in every
checkpoint.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with None for each number that is not finite, since JSON has no word for those."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


@dataclass
class History:
    """`log`: one record per `log_every` steps; `curve`: one per evaluation; `load`, `dropped`: per router,
    shares per log record.

    A log record's `loss` is the mean over the steps that were not skipped, None if all were. `turns`: round,
    steps and seconds of each turn in a race. `recent`: sums since the last log record.
    """

    log: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    load: dict[str, list[list[float]]] = field(default_factory=dict)
    dropped: dict[str, list[float]] = field(default_factory=dict)
    turns: list[dict[str, float]] = field(default_factory=list)
    recent: dict[str, Any] = field(
        default_factory=lambda: {"steps": 0, "loss": 0.0, "seconds": 0.0, "routers": {}}
    )

    def note_step(self, record: dict[str, Any], routers: dict[str, dict[str, Tensor]], every: int) -> None:
        """Add a step; on each `every`-th, close a log record with the means since the last."""
        recent = self.recent
        recent["steps"] += 1
        if record["skipped"]:
            recent["skipped"] = recent.get("skipped", 0) + 1
        else:
            recent["loss"] += record["loss"]
        recent["seconds"] += record["step_seconds"]
        for name, counted in routers.items():
            own = recent["routers"].setdefault(name, {"counts": [0] * len(counted["counts"]), "kept": 0})
            own["counts"] = [a + b for a, b in zip(own["counts"], counted["counts"].tolist(), strict=True)]
            own["kept"] += int(counted["kept"].sum())
        if record["step"] % every == 0:
            self._close(record)

    def _close(self, record: dict[str, Any]) -> None:
        recent = self.recent
        steps, skipped = recent["steps"], recent.get("skipped", 0)
        self.log.append(
            {
                **finite(record),
                "loss": recent["loss"] / (steps - skipped) if steps > skipped else None,
                "step_seconds": recent["seconds"] / steps,
                "skipped_steps": skipped,
            }
        )
        for name, counted in recent["routers"].items():
            total = max(sum(counted["counts"]), 1)
            self.load.setdefault(name, []).append([round(c / total, 6) for c in counted["counts"]])
            self.dropped.setdefault(name, []).append(round(1 - counted["kept"] / total, 6))
        self.recent = History().recent

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON holds exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """Return what `to_dict` gave, sharing nothing with it."""
        return cls(**copy.deepcopy(data))
