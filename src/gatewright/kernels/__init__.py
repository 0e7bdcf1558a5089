"""What computes: the definition of an expert layer (reference) and its fast forms, one meaning for all."""

from gatewright.kernels.activations import ACTIVATIONS, activate, check_activation, is_gated
from gatewright.kernels.attention import attend, choose_attention
from gatewright.kernels.choose import (
    BACKENDS,
    choose_backend,
    expert_mlp,
    expert_mlp_sorted,
    runnable_backends,
)
from gatewright.kernels.native.route import FusedRoute, TopK, fused_route
from gatewright.kernels.plan import DispatchPlan, ExpertWeights
from gatewright.kernels.ranking import rank_rows, ranks_fast

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "DispatchPlan",
    "ExpertWeights",
    "FusedRoute",
    "TopK",
    "activate",
    "attend",
    "check_activation",
    "choose_attention",
    "choose_backend",
    "expert_mlp",
    "expert_mlp_sorted",
    "fused_route",
    "is_gated",
    "rank_rows",
    "ranks_fast",
    "runnable_backends",
]
