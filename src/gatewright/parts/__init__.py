"""Mechanism only: routing, dispatch, experts, balance losses, and the layer that joins them."""

from gatewright.kernels import DispatchPlan
from gatewright.parts.balancing import attach_loss, balance_loss, z_loss
from gatewright.parts.capacity import Capacity, expert_capacity
from gatewright.parts.dispatch import count_assignments, make_plan
from gatewright.parts.experts import MLP, Experts
from gatewright.parts.layer import MoELayer
from gatewright.parts.router import Noise, Routed, Router
from gatewright.parts.routing import (
    WEIGHT_FORMS,
    Assignment,
    RoutingCall,
    SelectionRule,
    WeightForm,
    check_selection,
    from_mask,
    select_top,
)
from gatewright.parts.rules import (
    RouterInfo,
    TokenChoice,
    all_routers,
    build_router,
    register,
    router_info,
    token_choice,
)
from gatewright.parts.scores import SCORES, softmax_scores
from gatewright.parts.stats import RouterStats, Stats

__all__ = [
    "MLP",
    "SCORES",
    "WEIGHT_FORMS",
    "Assignment",
    "Capacity",
    "DispatchPlan",
    "Experts",
    "MoELayer",
    "Noise",
    "Routed",
    "Router",
    "RouterInfo",
    "RouterStats",
    "RoutingCall",
    "SelectionRule",
    "Stats",
    "TokenChoice",
    "WeightForm",
    "all_routers",
    "attach_loss",
    "balance_loss",
    "build_router",
    "check_selection",
    "count_assignments",
    "expert_capacity",
    "from_mask",
    "make_plan",
    "register",
    "router_info",
    "select_top",
    "softmax_scores",
    "token_choice",
    "z_loss",
]
