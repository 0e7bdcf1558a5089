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
from gatewright.kernels.cross_entropy import cross_entropy
from gatewright.kernels.dense import dense_mlp
from gatewright.kernels.few_rows import apply_linears, few_rows_linear
from gatewright.kernels.int8 import dequantise, quantise
from gatewright.kernels.linears import linears
from gatewright.kernels.native.route import FusedRoute, TopK, fused_route
from gatewright.kernels.norm import add_norm, rms_norm
from gatewright.kernels.plan import DispatchPlan, ExpertWeights
from gatewright.kernels.ranking import rank_rows, ranks_fast
from gatewright.kernels.within import attend_within

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "DispatchPlan",
    "ExpertWeights",
    "FusedRoute",
    "TopK",
    "activate",
    "add_norm",
    "apply_linears",
    "attend",
    "attend_within",
    "check_activation",
    "choose_attention",
    "choose_backend",
    "cross_entropy",
    "dense_mlp",
    "dequantise",
    "expert_mlp",
    "expert_mlp_sorted",
    "few_rows_linear",
    "fused_route",
    "is_gated",
    "linears",
    "quantise",
    "rank_rows",
    "ranks_fast",
    "rms_norm",
    "runnable_backends",
]
