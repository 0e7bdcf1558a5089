"""The settings of a race, and the sides that they ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from gatewright.backbones import per_layer
from gatewright.errors import UserError
from gatewright.experiments.twin import Against, dense_twin, selected_per_token
from gatewright.papers.registry import get_text_paper
from gatewright.training import LoopSettings, TrainRun


@dataclass(frozen=True)
class RaceRun(LoopSettings):
    """Race a sparse model against dense twins. The defaults are the quickstart's."""

    out: str = "runs/race"
    """folder for the sides' runs, the result and the report"""
    seeds: int = 1
    """how many seeds to run: 0, 1, ... one after the other"""
    first_seed: int = 0
    """the first of them"""
    tokens: int = 8_192_000
    """tokens of the dense twin's annealed run (100 %)"""
    fraction: float = 0.6
    """share of those tokens on which the sparse model is annealed"""
    against: Against = "active"
    """the twin has equal FLOPs per token (active), or as many total parameters (total)"""
    triangle: bool = False
    """race both twins and draw quality, compute and size in one figure"""
    experts: tuple[int, ...] = ()
    """race several numbers of experts, as 2,4,8: the scaling curve"""
    data_fraction: tuple[float, ...] = ()
    """race on these shares of the training documents, as 0.01,0.1,1: the small-data curve"""
    sparse_rate: float = 6e-3
    """peak learning rate of sparse sides"""
    dense_rate: float = 6e-3
    """peak learning rate of dense sides"""
    turn_steps: int = 10
    """optimizer steps of the dense twin per turn"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "tokens", "turn_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}; allowed: 1 or more")
        if self.first_seed < 0:
            raise UserError(f"first_seed {self.first_seed}; allowed: 0 or more")
        if not 0 < self.fraction <= 1:
            raise UserError(
                f"fraction {self.fraction}; allowed: above 0, up to 1; it is the sparse model's share of "
                "the tokens"
            )
        for name in ("sparse_rate", "dense_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)}; allowed: above 0")
        if any(not 0 < f <= 1 for f in self.data_fraction):
            raise UserError(
                f"data_fraction {self.data_fraction}; allowed: shares above 0, up to 1, as 0.01,0.1,1"
            )
        if any(n < 1 for n in self.experts):
            raise UserError(f"experts {self.experts}; allowed: numbers of 1 or more, as 2,4,8")
        asked = {
            "--triangle": self.triangle,
            "--experts": self.experts,
            "--data-fraction": self.data_fraction,
        }
        if sum(map(bool, asked.values())) > 1:
            both = " and ".join(name for name, given in asked.items() if given)
            raise UserError(f"{both} together; allowed: one of them; run two races")
        for name in ("experts", "data_fraction"):
            if len({f"{v:g}" for v in getattr(self, name)}) < len(getattr(self, name)):
                raise UserError(f"{name} {getattr(self, name)}; allowed: each value once")


@dataclass(frozen=True)
class Side:
    """One model of a race: its name, what it is, and the training run that makes it."""

    name: str
    kind: Literal["sparse", "dense"]
    label: str
    against: str | None
    run: TrainRun
    data_fraction: float = 1.0


def race_sides(race: RaceRun, seed: int) -> list[Side]:
    """Return the sides of one seed, the dense twins first. All sides of a race see the same token stream.

    Of several numbers of experts the twin equals the largest: no sparse side then has more of what they are
    matched in.
    """
    settings = race.model if race.model is not None else get_text_paper(race.paper).Settings()
    matched = with_experts(settings, max(race.experts)) if race.experts else settings
    sides = []
    twins: tuple[Against, ...] = ("active", "total") if race.triangle else (race.against,)
    for share in race.data_fraction or (1.0,):
        suffix = f"-data{share:g}" if race.data_fraction else ""
        of_data = f" on {100 * share:g} % of the documents" if race.data_fraction else ""
        for against in twins:
            twin = dense_twin(race.paper, matched, against)
            name = f"dense-{against}" if len(twins) > 1 else "dense"
            equal = "FLOPs per token" if against == "active" else "total parameters"
            of_what = f" to {max(race.experts)} experts" if len(race.experts) > 1 else ""
            label = f"dense twin of equal {equal}{of_what}{of_data}"
            sides.append(_side(race, seed, name + suffix, "dense", label, against, twin, share))
        for number in race.experts or (None,):
            own = settings if number is None else with_experts(settings, number)
            name = "sparse" if number is None else f"sparse-{number}"
            chosen = f"{_listed(own.num_experts)} experts, {_listed(selected_per_token(own))} per token"
            label = f"{race.paper}, {chosen}{of_data}"
            sides.append(_side(race, seed, name + suffix, "sparse", label, None, own, share))
    return sides


def with_experts(settings: Any, num_experts: int) -> Any:
    """Return the settings with E changed and the compute per token as it was (but for the router's).

    With fewer experts than num_selected, every token takes all of them, and each is wider by as much.
    Raises: UserError if that width is no whole number.
    """
    n = settings.num_layers
    selected = per_layer("num_selected", selected_per_token(settings), n)
    active = [
        k * f for k, f in zip(selected, per_layer("expert_width", settings.expert_width, n), strict=True)
    ]
    taken = [min(k, num_experts) for k in selected]
    if any(a % k for a, k in zip(active, taken, strict=True)):
        raise UserError(
            f"experts {num_experts} with an active width of {max(active)}; allowed: numbers of experts that "
            f"divide it, or num_selected {max(selected)} and more"
        )
    width = tuple(a // k for a, k in zip(active, taken, strict=True))
    changes: dict[str, Any] = {"num_experts": num_experts, "expert_width": _one(width)}
    if hasattr(settings, "num_selected"):
        changes["num_selected"] = _one(tuple(taken))
    return dataclasses.replace(settings, **changes)


def _one(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else values


def _listed(value: Any) -> str:
    return "/".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _side(
    race: RaceRun,
    seed: int,
    name: str,
    kind: Literal["sparse", "dense"],
    label: str,
    against: str | None,
    model: Any,
    share: float,
) -> Side:
    shared = {f.name: getattr(race, f.name) for f in dataclasses.fields(LoopSettings)}
    budget = race.tokens if kind == "dense" else round(race.tokens * race.fraction)
    run = TrainRun(
        **{**shared, "model": model},
        out=f"{race.out}/seed{seed}/{name}",
        seed=seed,
        learning_rate=race.dense_rate if kind == "dense" else race.sparse_rate,
        tokens=budget,
        data_fraction=share,
    )
    return Side(name, kind, label, against, run, share)
