"""What computes: the definition of an expert layer (reference) and its fast forms, one meaning for all."""

from gatewright.kernels.activations import ACTIVATIONS, activate, check_activation, is_gated
from gatewright.kernels.choose import (
    BACKENDS,
    choose_backend,
    expert_mlp,
    expert_mlp_sorted,
    runnable_backends,
)
from gatewright.kernels.few_rows import apply_linears, few_rows_linear
from gatewright.kernels.int8 import dequantise, quantise
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
    "apply_linears",
    "check_activation",
    "choose_backend",
    "dequantise",
    "expert_mlp",
    "expert_mlp_sorted",
    "few_rows_linear",
    "fused_route",
    "is_gated",
    "quantise",
    "rank_rows",
    "ranks_fast",
    "runnable_backends",
]
