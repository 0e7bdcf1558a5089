"""The on-line form of a tree of experts: recursive least squares, one case at a time (section 2.9, 1994)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from gatewright.backbones.tree import ExpertTree
from gatewright.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Forgetting:
    """The schedule of lambda: `first`, and every `every` cases `share` of the rest to 1 (section 2.10)."""

    first: float = 0.99
    share: float = 0.6
    every: int = 1000

    def at(self, case: int) -> float:
        """Return lambda for the case of that number, from 0."""
        return float(1.0 - (1.0 - self.first) * (1.0 - self.share) ** (case // self.every))


def weighted_rls(inverse: Array, x: Array, weight: Array, forgetting: float) -> Array:
    """Update inverse covariances [N, D, D] in place for one case x [D] that weighs `weight` [N], and return
    the gains [N, D]: what an error of 1 moves the weights by.

    Equations: 2.27 to 2.32 with R after its update, gain = h R x; R <- (R - h R x x^T R / (lambda + h x^T R
    x)) / lambda. With lambda 1 the weights are those of weighted least squares with a ridge, R at the start
    inverted.
    """
    along = inverse @ x
    gains = along * (weight / (forgetting + weight * (along @ x)))[:, None]
    inverse -= gains[:, :, None] * along[:, None, :]
    inverse /= forgetting
    return gains


@dataclass
class OnLine:
    """A tree that learns case by case; `write` puts what it has learnt into the tree. Gaussian experts only.

    `start`: the inverse covariances at first are this times the identity. `least_log`: ln h is cut below it.
    Each expert's variance is its running mean of squared errors, forgotten alike, but at least `floor`.
    """

    tree: ExpertTree
    variance: float = 1.0
    start: float = 1.0
    least_log: float = -7.0
    floor: float = 1e-4
    schedule: Forgetting = field(default_factory=Forgetting)

    def __post_init__(self) -> None:
        if self.tree.experts.squash != "linear":
            raise UserError(
                f"squash {self.tree.experts.squash!r} on-line; allowed: linear; fit other trees with fit_em"
            )
        gates = [_rows(gate.weight, gate.bias).reshape(-1, _width(self.tree)) for gate in self.tree.levels]
        self._gates: Array = np.concatenate(gates)
        self._experts: Array = _rows(self.tree.experts.weight, self.tree.experts.bias)
        units, experts = len(self._gates), len(self._experts)
        # Units of one gate stand side by side; `_first` is where each gate begins, `_gate` whose each unit
        # is.
        sizes = [b for level, b in enumerate(self.tree.branching) for _ in range(_nodes(self.tree, level))]
        self._first = np.cumsum([0, *sizes[:-1]])
        self._gate = np.repeat(np.arange(len(sizes)), sizes)
        self._paths = _paths(self.tree)
        self._inverse = np.tile(np.eye(_width(self.tree)) * self.start, (units + experts, 1, 1))
        self._variances, self._seen = np.full(experts, self.variance), np.ones(experts)
        self.cases = 0

    def learn(self, x: Array, y: Array) -> None:
        """Take cases x [T, D] with targets y [T, C], one after another in this order."""
        for case, target in zip(np.concatenate([x, np.ones_like(x[:, :1])], 1), y, strict=True):
            self._one(case, target)

    def _one(self, x: Array, y: Array) -> None:
        """Take one case: posteriors at the weights so far, then a step of `_move`."""
        errors = y - self._experts @ x
        squared = (errors * errors).sum(-1)
        logits = self._gates @ x
        log_g = logits - _log_sum(logits, self._first)[self._gate]
        density = -squared / (2 * self._variances) - y.size * np.log(self._variances) / 2
        log_h = self._paths @ log_g + density
        h = np.exp(log_h - log_h.max())
        h /= h.sum()
        mass = h @ self._paths
        node = np.add.reduceat(mass, self._first)[self._gate]
        self._move(x, errors, h, mass, node, logits, log_g)
        self.cases += 1

    def _move(
        self, x: Array, errors: Array, h: Array, mass: Array, node: Array, logits: Array, log_g: Array
    ) -> None:
        """Take a step of 2.27 to 2.32: experts, and units of gates by their own and their gate's h."""
        forgetting = self.schedule.at(self.cases)
        # Of a branch that nothing reaches ln h_j|i does not matter: its weight is 0.
        log_branch = np.log(np.maximum(mass, 1e-300)) - np.log(np.maximum(node, 1e-300))
        gains = weighted_rls(self._inverse, x, np.concatenate([node, h]), forgetting)
        units = len(logits)
        self._gates += gains[:units] * (np.maximum(log_branch, self.least_log) - logits)[:, None]
        self._experts += errors[:, :, None] * gains[units:, None, :]
        self._seen = forgetting * self._seen + h
        squared = (errors * errors).mean(-1)
        self._variances += h / self._seen * (squared - self._variances)
        np.maximum(self._variances, self.floor, out=self._variances)

    def write(self) -> ExpertTree:
        """Return the tree with what was learnt so far."""
        with torch.no_grad():
            place = 0
            for level, gate in enumerate(self.tree.levels):
                size = _nodes(self.tree, level) * self.tree.branching[level]
                own = torch.from_numpy(self._gates[place : place + size]).view(*gate.bias.shape, -1)
                gate.weight.copy_(own[..., :-1])
                gate.bias.copy_(own[..., -1])
                place += size
            experts = torch.from_numpy(self._experts)
            self.tree.experts.weight.copy_(experts[..., :-1])
            self.tree.experts.bias.copy_(experts[..., -1])
            eye = torch.eye(experts.shape[1], dtype=torch.float64)
            self.tree.covariance.copy_(torch.from_numpy(self._variances).view(-1, 1, 1) * eye)
        return self.tree


@dataclass
class OnLineGradient(OnLine):
    """The same by gradient steps of one case each (2.17, and 2.15 and 2.16 without their sums): `rate` is the
    step, `variance`, the experts', stays as it is.
    """

    rate: float = 0.01

    def _move(
        self, x: Array, errors: Array, h: Array, mass: Array, node: Array, logits: Array, log_g: Array
    ) -> None:
        self._experts += (self.rate * h)[:, None, None] * errors[:, :, None] * x
        self._gates += (self.rate * (mass - node * np.exp(log_g)))[:, None] * x


def _rows(weight: torch.Tensor, bias: torch.Tensor) -> Array:
    return torch.cat([weight, bias.unsqueeze(-1)], -1).detach().double().numpy().copy()


def _width(tree: ExpertTree) -> int:
    return tree.experts.weight.shape[-1] + 1


def _nodes(tree: ExpertTree, level: int) -> int:
    return int(np.prod(tree.branching[:level], dtype=np.int64))


def _paths(tree: ExpertTree) -> Array:
    """Return [E, units]: 1 where an expert is below a branch."""
    blocks = []
    for level, branches in enumerate(tree.branching):
        units = _nodes(tree, level) * branches
        blocks.append(np.repeat(np.eye(units), tree.num_experts // units, axis=0))
    return np.concatenate(blocks, axis=1)


def _log_sum(logits: Array, first: NDArray[np.int64]) -> Array:
    """Return each gate's log of summed exponentials."""
    top = np.maximum.reduceat(logits, first)
    sizes = np.diff(np.append(first, len(logits)))
    return top + np.log(np.add.reduceat(np.exp(logits - np.repeat(top, sizes)), first))
