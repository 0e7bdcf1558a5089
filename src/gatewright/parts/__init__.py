"""Mechanism only: routing, dispatch, experts, balance losses, and the layer that joins them."""

from gatewright.kernels import DispatchPlan
from gatewright.parts.balancing import attach_loss, balance_loss, gshard_loss, z_loss
from gatewright.parts.capacity import Capacity, expert_capacity
from gatewright.parts.coefficients import Coefficient, coefficient_for, coefficients_for
from gatewright.parts.device_losses import communication_loss, device_loss
from gatewright.parts.dispatch import count_assignments, make_plan
from gatewright.parts.experts import MLP, Experts
from gatewright.parts.free_experts import FreeExperts
from gatewright.parts.hidden_gate import HiddenGate
from gatewright.parts.int8_experts import Int8Experts
from gatewright.parts.layer import MoELayer
from gatewright.parts.linear_experts import LinearExperts
from gatewright.parts.losses import LOSSES
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.parts.noise import InputJitter, LogitNoise, SoftplusNoise, load_estimate
from gatewright.parts.quantise import quantise_experts
from gatewright.parts.restraint import Restrained, restrain
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
from gatewright.parts.running import RunningCounts
from gatewright.parts.scores import SCORES, softmax_scores
from gatewright.parts.selection_bias import SelectionBias
from gatewright.parts.shared import GatedShared
from gatewright.parts.soft import SoftMoELayer
from gatewright.parts.stats import RouterStats, Stats
from gatewright.parts.variation import importance_loss, load_loss

__all__ = [
    "LOSSES",
    "MLP",
    "SCORES",
    "WEIGHT_FORMS",
    "Assignment",
    "Capacity",
    "Coefficient",
    "DispatchPlan",
    "Experts",
    "FreeExperts",
    "GatedShared",
    "HiddenGate",
    "InputJitter",
    "Int8Experts",
    "LinearExperts",
    "LogitNoise",
    "MoELayer",
    "ModuleExperts",
    "Noise",
    "Restrained",
    "Routed",
    "Router",
    "RouterInfo",
    "RouterStats",
    "RoutingCall",
    "RunningCounts",
    "SelectionBias",
    "SelectionRule",
    "SoftMoELayer",
    "SoftplusNoise",
    "Stats",
    "TokenChoice",
    "WeightForm",
    "all_routers",
    "attach_loss",
    "balance_loss",
    "build_router",
    "check_selection",
    "coefficient_for",
    "coefficients_for",
    "communication_loss",
    "count_assignments",
    "device_loss",
    "expert_capacity",
    "from_mask",
    "gshard_loss",
    "importance_loss",
    "load_estimate",
    "load_loss",
    "make_plan",
    "quantise_experts",
    "register",
    "restrain",
    "router_info",
    "select_top",
    "softmax_scores",
    "token_choice",
    "z_loss",
]
