"""One run of a deep mixture: two phases of gradient descent, errors, and what its gates go by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatewright.backbones import DeepMixture
from gatewright.data.images import PLACES
from gatewright.errors import Diverged
from gatewright.experiments.deep_cases import Cases, Shifted, cases_of
from gatewright.experiments.information import effective
from gatewright.experiments.lab import kept
from gatewright.papers import get_paper

Record = dict[str, Any]
Show = Callable[[float, str], None]
# Of the test pictures, at most so many are shown to the gates, each at every place.
MAPPED = 1_000


@dataclass(frozen=True)
class Recipe:
    """How a run learns: stochastic gradient descent at one step size, `first` epochs under the constraint and
    `second` without; first = 0 never has it.
    """

    first: int
    second: int
    rate: float = 0.05
    momentum: float = 0.9
    batch: int = 50


def kept_run(
    work: Path, name: str, settings: Any, recipe: Recipe, data: str, seed: int, show: Show
) -> Record:
    """Return one run's record; a finished one is read from `work`."""
    about = {"settings": asdict(settings), "recipe": asdict(recipe), "data": data, "seed": seed}
    path = work / f"{name}-{seed}.json"
    return kept(path, json.loads(json.dumps(about)), partial(_run, settings, recipe, data, seed, show))


def _run(settings: Any, recipe: Recipe, data: str, seed: int, show: Show) -> Record:
    started = process_time()
    cases = cases_of(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_paper("deep_moe").build(settings)
    curve = learn(model, recipe, settings.margin, cases, seed, show)
    record: Record = {"seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
    record |= {f"{part}_error": error_of(model, cases, part) for part in ("train", "test")}
    record["curve"] = curve
    if settings.top == "mixture":
        record["gates"] = gates_by_class(model, cases) if data == "vowels" else gates_by_place(model, cases)
    return {**record, "cpu_seconds": process_time() - started}


def learn(
    model: DeepMixture, recipe: Recipe, margin: float, cases: Cases, seed: int, show: Show
) -> list[Record]:
    """Train through both phases; return for each epoch the mean loss and how many experts of each layer were
    in use: exp of the entropy of the mean gate.
    """
    objective = get_paper("deep_moe").objective(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.rate, momentum=recipe.momentum)
    draw = np.random.default_rng((seed, 2013))
    totals, curve, epochs = model.begin(), [], recipe.first + recipe.second
    for epoch in range(epochs):
        restrained, loss_sum, steps = epoch < recipe.first, 0.0, 0
        used = [torch.zeros_like(own) for own in totals]
        order = draw.permutation(len(cases))
        for start in range(0, len(order), recipe.batch):
            x, label = cases.batch(order[start : start + recipe.batch], draw)
            output = model(x, totals if restrained else None, margin)
            loss = objective(output, label).total
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            totals = output.totals if restrained else totals
            used = [
                own + gates.detach().double().sum(0) for own, gates in zip(used, output.gates, strict=True)
            ]
            loss_sum, steps = loss_sum + float(loss.detach()), steps + 1
        if not math.isfinite(loss_sum):
            raise Diverged(
                f"the loss is not finite in epoch {epoch + 1} of seed {seed} at rate {recipe.rate:g}"
            )
        curve.append({"loss": loss_sum / steps, "effective": [effective(own) for own in used]})
        show((epoch + 1) / epochs, f"epoch {epoch + 1} of {epochs}, loss {loss_sum / steps:.3f}")
    return curve


@torch.no_grad()
def error_of(model: DeepMixture, cases: Cases, part: str) -> float:
    """Return the per cent of "train" or "test" cases that are given another class than theirs."""
    wrong = count = 0
    for x, label in cases.checks(part):
        wrong += int((model(x).logits.argmax(-1) != label).sum())
        count += len(label)
    return 100 * wrong / count


@torch.no_grad()
def gates_by_place(model: DeepMixture, cases: Cases) -> Record:
    """Return sums of the gates over test pictures at all 81 places, every picture at each: for each layer by
    `place` [81, E] and by `label` [C, E]; of two layers also `joint` [E1, E2], sums of g1 g2.
    """
    assert isinstance(cases, Shifted)
    which = np.arange(min(len(cases.test), MAPPED))
    label = torch.from_numpy(cases.test.label[which])
    place_rows: list[list[Tensor]] = []
    label_sums: list[Tensor] = []
    joint = None
    for place in range(PLACES):
        x = torch.from_numpy(cases.test.shifted(which, np.full(len(which), place)))
        gates = [own.double() for own in model(x).gates]
        by_label = _by_label(gates, label, cases.num_classes)
        place_rows = place_rows or [[] for _ in gates]
        for rows, own in zip(place_rows, gates, strict=True):
            rows.append(own.sum(0))
        label_sums = [a + b for a, b in zip(label_sums, by_label, strict=True)] if label_sums else by_label
        if len(gates) == 2:
            both = gates[0].t() @ gates[1]
            joint = both if joint is None else joint + both
    return _plain({"place": [torch.stack(rows) for rows in place_rows], "label": label_sums, "joint": joint})


@torch.no_grad()
def gates_by_class(model: DeepMixture, cases: Cases) -> Record:
    """Return sums of the gates over the test cases, for each layer by `label` [C, E], and `joint`."""
    (x, label), *_ = cases.checks("test")
    gates = [own.double() for own in model(x).gates]
    joint = gates[0].t() @ gates[1] if len(gates) == 2 else None
    return _plain({"label": _by_label(gates, label, cases.num_classes), "joint": joint})


def _by_label(gates: list[Tensor], label: Tensor, num_classes: int) -> list[Tensor]:
    one_hot = torch.nn.functional.one_hot(label, num_classes).double()
    return [one_hot.t() @ own for own in gates]


def _plain(tables: Record) -> Record:
    """Return tensors as nested lists of numbers with six digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return plain(value.tolist())
        if isinstance(value, list):
            return [plain(one) for one in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {name: plain(own) for name, own in tables.items()}
