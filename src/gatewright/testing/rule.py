"""What a rule is to the checker: the keywords it takes, its cases, its definition and known mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gatewright.testing.cases import Case
from gatewright.testing.slow_routers import Slow, SlowSums

SHAPES = ((6, 5), (2, 24), (1, 2), (0, 4))


@dataclass(frozen=True)
class Rule:
    """One rule. `takes`: the keywords that the function gets beside its logits and K. `mistakes`: other
    definitions by what is wrong with them. `shapes` (T, E) and `least`, `most` bound what is drawn; `noise`
    on the logits must not change a drawn choice. `open_places`: tokens may use fewer than K experts.
    `by_expert`: the function returns tokens and weights [E, C]. `learns`: weights carry gradient. `shift` is
    added to drawn logits. `sums`: what a function may return beside its choice, by name, each as a list of
    numbers; `wrong_sums` as `mistakes`.
    """

    meaning: str
    cases: tuple[Case, ...]
    slow: Slow
    takes: tuple[str, ...] = ()
    mistakes: Mapping[str, Slow] = field(default_factory=dict)
    shapes: tuple[tuple[int, int], ...] = SHAPES
    least: int = 1
    most: int = 9
    noise: float = 1e-3
    open_places: bool = False
    by_expert: bool = False
    learns: bool = True
    shift: float = 0.0
    sums: SlowSums | None = None
    wrong_sums: Mapping[str, SlowSums] = field(default_factory=dict)
