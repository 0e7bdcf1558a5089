"""Hierarchical Mixtures of Experts and the EM Algorithm (Jordan and Jacobs, Neural Computation 6(2), 1994).

A tree: gates at the inner nodes divide the inputs softly, experts at the leaves are generalised linear
models. The whole is one likelihood, so that expectation-maximisation fits it: the posteriors of every branch,
then a weighted fit of every expert and gate by itself. It needs far fewer passes over the data than a
gradient.

Equations: 2.1, expert mu_ij = f(U_ij x); 2.2 to 2.5, gates g_i and g_j|i, softmax of linear maps; 2.9, P(y|x)
= sum_i g_i sum_j g_j|i P_ij(y); 2.10 to 2.12, posteriors h_i, h_j|i, h_ij; 2.13, the log likelihood; 2.14 to
2.16, its gradients for Gaussians of unit covariance; 2.22 to 2.24, the M-step; 2.27 to 2.32, the on-line
form.
Algorithm 1 fits gates by IRLS, algorithm 2 by least squares on ln h. Fitting: `gatewright.training.em` and
`gatewright.training.recursive`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import ExpertTree, HiddenLayer
from gatewright.errors import UserError
from gatewright.objectives import CaseLikelihood


@dataclass(frozen=True)
class Settings:
    """A small tree on the arm's cases; what the paper does not give is called ours."""

    width: int = 12
    """D, numbers per case: positions, velocities and torques of four joints"""
    num_outputs: int = 4
    """C, outputs per expert: accelerations, or classes"""
    squash: str = "linear"
    """f: linear (Gaussian experts), logistic (Bernoulli) or softmax (multinomial)"""
    branching: tuple[int, ...] = (2, 2)
    """branches of a gate by level, from the top; an empty one is one net with a hidden layer instead"""
    hidden_width: int = 60
    """logistic hidden units of that one net"""
    init: float = 0.1
    """weights of experts and nets are drawn evenly from -init to init (ours)"""
    gate_init: float = 1.0
    """the same of the gates (ours): near 0 the experts part late, and exact EM stays at poor maxima"""


PUBLISHED: dict[str, Settings] = {
    # Section 2.8: 16 experts and 15 gates of four binary levels, and a net of about as many parameters.
    "hme-16": Settings(branching=(2, 2, 2, 2)),
    "back-propagation-60": Settings(branching=()),
    # Figure 6: 32 experts in one, three (two ways) and five levels, 64 in six.
    "hme-32-1-level": Settings(branching=(32,)),
    "hme-32-3-levels-a": Settings(branching=(4, 4, 2)),
    "hme-32-3-levels-b": Settings(branching=(2, 4, 4)),
    "hme-32-5-levels": Settings(branching=(2, 2, 2, 2, 2)),
    "hme-64-6-levels": Settings(branching=(2, 2, 2, 2, 2, 2)),
}


def build(settings: Settings) -> nn.Module:
    """Return the tree, or with an empty `branching` the one net, freshly drawn."""
    s = settings
    if s.width < 1:
        raise UserError(f"width {s.width}; allowed: 1 or more; it is the numbers per case")
    if not s.branching:
        return HiddenLayer(s.width, s.hidden_width, s.num_outputs, s.squash, init=s.init)
    return ExpertTree(s.width, s.branching, s.num_outputs, s.squash, init=s.init, gate_init=s.gate_init)


def objective(settings: Settings) -> CaseLikelihood:
    """Return minus the log likelihood, which the gradient form descends; for a net, half the squares."""
    return CaseLikelihood(settings.squash)


def free_parameters(settings: Settings) -> int:
    """Return the numbers that matter: of a gate's branches only differences do, so one of them is free."""
    s = settings
    if not s.branching:
        return (s.width + 1) * s.hidden_width + (s.hidden_width + 1) * s.num_outputs
    nodes, gates = 1, 0
    for branches in s.branching:
        gates += nodes * (branches - 1)
        nodes *= branches
    return (s.width + 1) * (gates + nodes * s.num_outputs)


DEVIATIONS: tuple[str, ...] = (
    "The arm's simulator is another paper's and its constants are not in this one: our arm has four joints "
    "in three "
    "dimensions too, but links, ranges of states and torques are ours, so errors are not comparable in size.",
    "Which covariance the paper's runs gave their experts is not said: ours is one variance for all, fitted, "
    "as in "
    "its example 2.2.1; the forms with one or a matrix per expert are there too.",
    "First weights are not in the paper; ours are drawn evenly from a range, the gates' wider than its "
    "figure 3 "
    "suggests, where posteriors begin near an equal share.",
    "IRLS takes steps that are halved until the fit improves, with a tiny ridge, so that the likelihood "
    "cannot "
    "fall; the paper says neither.",
    "The least-squares form cuts ln h from below, since h can be 0; where, the paper does not say.",
    "On-line, the inverse covariances weigh each case by its posterior, as recursive least squares does; the "
    "copy of "
    "the paper that was read prints 2.28 without that weight. Each expert's running variance is ours.",
    "CART here is scikit-learn's tree, its leaf size chosen on held-out training cases; CART with linear "
    "splits and "
    "MARS have not been run.",
)
