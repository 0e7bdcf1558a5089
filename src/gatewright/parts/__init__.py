"""Mechanism only: routing, dispatch, experts, balance losses, and the layer that joins them."""

from gatewright.kernels import DispatchPlan
from gatewright.parts.balancing import attach_loss, balance_loss, z_loss
from gatewright.parts.dispatch import count_assignments, expert_capacity, make_plan
from gatewright.parts.experts import MLP, Experts
from gatewright.parts.layer import MoELayer
from gatewright.parts.routing import (
    WEIGHT_FORMS,
    Assignment,
    Router,
    WeightForm,
    check_selection,
    select_top,
    softmax_scores,
    token_choice,
)
from gatewright.parts.stats import RouterStats, Stats

__all__ = [
    "MLP",
    "WEIGHT_FORMS",
    "Assignment",
    "DispatchPlan",
    "Experts",
    "MoELayer",
    "Router",
    "RouterStats",
    "Stats",
    "WeightForm",
    "attach_loss",
    "balance_loss",
    "check_selection",
    "count_assignments",
    "expert_capacity",
    "make_plan",
    "select_top",
    "softmax_scores",
    "token_choice",
    "z_loss",
]
