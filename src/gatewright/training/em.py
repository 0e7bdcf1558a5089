"""Expectation-maximisation of a tree of gates over experts (Jordan and Jacobs 1994, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewright.backbones.tree import ExpertTree
from gatewright.errors import UserError, did_you_mean
from gatewright.objectives.likelihood import joint_posteriors, log_densities, log_likelihood
from gatewright.training.weighted_fits import fit_logits, least_squares

FORMS = ("exact", "least_squares")
"""Of the gates' M-step: IRLS run to convergence (algorithm 1), or least squares on ln h (algorithm 2)."""
COVARIANCES = ("full", "diagonal", "spherical", "shared", "unit")
"""Of Gaussian experts: one matrix, one variance per output, or one number each; one number for all; fixed."""
# Shown after each epoch: how many there were, the log likelihood before it, and the tree.
Watch = Callable[[int, float, ExpertTree], None]


@dataclass(frozen=True)
class Posteriors:
    """The E-step: `experts` [T, E] = h_ij; by level `branches` [T, nodes, branches] = ln h_j|i and `nodes`
    [T, nodes] = h_i; `log_likelihood` [T] (2.10 to 2.13).
    """

    experts: Tensor
    branches: tuple[Tensor, ...]
    nodes: tuple[Tensor, ...]
    log_likelihood: Tensor


@dataclass(frozen=True)
class EM:
    """How a tree is fitted. `floor`: the least variance of a Gaussian expert, as a share of the outputs' own
    mean variance. `least_log`: below it ln h is cut, in the least-squares form alone. `decay` pulls all
    weights to 0 (section 3: ridge regression); above 0, what never falls is no longer the likelihood alone.
    """

    form: str = "exact"
    covariance: str = "full"
    floor: float = 1e-6
    least_log: float = -7.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("form", self.form, FORMS),
            ("covariance", self.covariance, COVARIANCES),
        ):
            if given not in allowed:
                raise UserError(
                    f"{name} {given!r} is unknown{did_you_mean(given, allowed)}; allowed: "
                    f"{', '.join(allowed)}"
                )
        if not self.decay >= 0:
            raise UserError(f"decay {self.decay}; allowed: 0 or more; 0 leaves the weights free")
        if not self.floor > 0:
            raise UserError(f"floor {self.floor}; allowed: above 0; an expert of one case would have none")


@torch.no_grad()
def e_step(tree: ExpertTree, x: Tensor, y: Tensor) -> Posteriors:
    """Return the posteriors of every expert and every branch for cases x [T, D] with targets y [T, C]."""
    levels = tree.log_gates(x)
    output = tree(x)
    squash = tree.experts.squash
    own = tree.covariance if squash == "linear" else None
    density = log_densities(squash, output.outputs, y, own)
    log_h = torch.log_softmax(output.logits + density, -1)
    branches, nodes = [], []
    for gates in levels:
        # The mass of a branch is that of all experts below it.
        mass = torch.logsumexp(log_h.view(*gates.shape, -1), -1)
        total = torch.logsumexp(mass, -1)
        branches.append(mass - total.unsqueeze(-1))
        nodes.append(total.exp())
    return Posteriors(
        joint_posteriors(output.logits, density),
        tuple(branches),
        tuple(nodes),
        log_likelihood(output.logits, density),
    )


@torch.no_grad()
def m_step(
    tree: ExpertTree, x: Tensor, y: Tensor, found: Posteriors, em: EM, case_weights: Tensor | None = None
) -> None:
    """Refit experts and gates to the posteriors, in place: steps 2 to 4 of the algorithms."""
    ones = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    own = torch.ones_like(x[:, 0]) if case_weights is None else case_weights
    _fit_experts(tree, ones, y, found.experts * own.unsqueeze(-1), em)
    for gate, branches, nodes in zip(tree.levels, found.branches, found.nodes, strict=True):
        for node in range(nodes.shape[1]):
            start = _joined(gate.weight[node], gate.bias[node])
            weight = nodes[:, node] * own
            if em.form == "exact":
                new = fit_logits(ones, weight.unsqueeze(-1) * branches[:, node].exp(), start, decay=em.decay)
            else:
                new = least_squares(ones, branches[:, node].clamp(min=em.least_log), weight, start, em.decay)
            gate.weight[node], gate.bias[node] = new[:, :-1], new[:, -1]


def _joined(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias.unsqueeze(-1)], -1)


def _fit_experts(tree: ExpertTree, x: Tensor, y: Tensor, h: Tensor, em: EM) -> None:
    experts = tree.experts
    for e in range(tree.num_experts):
        start = _joined(experts.weight[e], experts.bias[e])
        if experts.squash == "linear":
            new = least_squares(x, y, h[:, e], start, em.decay)
        elif experts.squash == "softmax":
            new = fit_logits(x, h[:, e : e + 1] * y, start, decay=em.decay)
        else:
            new = _fit_logistic(x, y, h[:, e], start, em.decay)
        experts.weight[e], experts.bias[e] = new[:, :-1], new[:, -1]
    if experts.squash == "linear" and em.covariance != "unit":
        _fit_covariances(tree, x, y, h, em)


def _fit_logistic(x: Tensor, y: Tensor, h: Tensor, start: Tensor, decay: float) -> Tensor:
    """Return [C, D]: each output is a logit of two classes of its own."""
    rows = []
    for c in range(y.shape[1]):
        masses = h.unsqueeze(-1) * torch.stack([y[:, c], 1 - y[:, c]], -1)
        own = torch.stack([start[c], torch.zeros_like(start[c])])
        rows.append(fit_logits(x, masses, own, decay=decay)[0])
    return torch.stack(rows)


def _fit_covariances(tree: ExpertTree, x: Tensor, y: Tensor, h: Tensor, em: EM) -> None:
    """Set each expert's covariance to that of its weighed residuals, eigenvalues raised to the floor: the
    most likely one of those that are allowed.
    """
    width = y.shape[1]
    floor = em.floor * float(_spread(y, h.sum(1)))
    eye = torch.eye(width, dtype=y.dtype)
    sums, masses = [], h.sum(0)
    for e in range(tree.num_experts):
        own = _joined(tree.experts.weight[e], tree.experts.bias[e])
        residual = y - x @ own.t()
        sums.append((residual * h[:, e : e + 1]).t() @ residual)
    if em.covariance == "shared":
        variance = torch.stack(sums).sum(0).trace() / (width * masses.sum())
        tree.covariance.copy_(eye * variance.clamp(min=floor))
        return
    for e, mass in enumerate(masses.tolist()):
        if mass <= 1e-9:
            continue  # nobody's residuals say nothing: what the expert had is as likely as anything
        own = sums[e] / mass
        if em.covariance == "spherical":
            own = eye * (own.trace() / width).clamp(min=floor)
        elif em.covariance == "diagonal":
            own = torch.diag(own.diagonal().clamp(min=floor))
        else:
            values, vectors = torch.linalg.eigh(own)
            own = (vectors * values.clamp(min=floor)) @ vectors.t()
        tree.covariance[e] = (own + own.t()) / 2


def _spread(y: Tensor, weight: Tensor) -> Tensor:
    """Return the variance of weighed cases, the mean over outputs; never 0, so that constant targets have
    one.
    """
    share = (weight / weight.sum()).unsqueeze(-1)
    return (share * (y - (share * y).sum(0)).square()).sum(0).mean().clamp(min=1e-12)


@torch.no_grad()
def fit_em(
    tree: ExpertTree,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    em: EM | None = None,
    tolerance: float = 0.0,
    case_weights: Tensor | None = None,
    watch: Watch | None = None,
) -> list[float]:
    """Fit the tree in place, an E- and an M-step per epoch, and return the log likelihood before each epoch
    and at the end. It never falls in the exact form; the least-squares form only approximates a maximum.

    Ends early once an epoch changes it by less than `tolerance` per case. Gaussians with a fitted covariance
    begin at the outputs' own variance.
    """
    em = em or EM()
    own = torch.ones_like(x[:, 0]) if case_weights is None else case_weights
    total = float(own.sum())
    if tree.experts.squash == "linear" and em.covariance != "unit":
        tree.covariance.copy_(torch.eye(y.shape[1], dtype=y.dtype) * _spread(y, own))
    history: list[float] = []
    for epoch in range(epochs):
        found = e_step(tree, x, y)
        history.append(float((own * found.log_likelihood).sum()))
        if tolerance > 0 and epoch and abs(history[-1] - history[-2]) < tolerance * total:
            return history
        m_step(tree, x, y, found, em, own)
        if watch is not None:
            watch(epoch + 1, history[-1], tree)
    history.append(float((own * e_step(tree, x, y).log_likelihood).sum()))
    return history
