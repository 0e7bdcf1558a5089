"""Which backend computes the experts, and why."""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import grouped, native, padded, reference
from gatewright.kernels.native import experts as native_experts
from gatewright.kernels.plan import DispatchPlan, ExpertWeights

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "grouped": grouped,
    "padded": padded,
    "native": native_experts,
}


def choose_backend(name: str | None = None, x: Float[Tensor, "T D"] | None = None) -> tuple[str, str]:
    """Return (backend name, reason). `name` None lets the toolkit choose for rows like `x` (None: fp32 on
    the CPU); a name is taken as given.

    Raises: UserError for an unknown name.
    """
    if name is None:
        if torch.compiler.is_exporting():
            return "padded", "an exported program shall run without this toolkit: torch's own operators alone"
        if x is not None and (x.device.type != "cpu" or x.dtype not in native_experts.DTYPES):
            return "grouped", f"grouped matmuls: the native kernels do not take {x.dtype} on {x.device.type}"
        if native.is_ready():
            return "native", "fastest backend on a CPU: C++ kernels, built for this machine"
        return "grouped", f"grouped matmuls: the native kernels do not run here ({native.status().reason})"
    if name not in BACKENDS:
        raise UserError(
            f"backend {name!r} is unknown{did_you_mean(name, BACKENDS)}; allowed: {', '.join(BACKENDS)}"
        )
    return name, "asked for by name"


def runnable_backends() -> tuple[str, ...]:
    """Return the names of the backends that run on this machine, all but perhaps `native`."""
    return tuple(name for name in BACKENDS if name != "native" or native.is_ready())


def expert_mlp(
    x: Float[Tensor, "T D"],
    plan: DispatchPlan,
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
    backend: str | None = None,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "T D"]:
    """Return y [T, D]: the planned rows of x [T, D] through their experts, combined with weights [T, K].

    Args: weights of x's dtype or a wider one; `combine_weights` in at least fp32 for low-precision x;
    `backend` as `choose_backend` takes it; `hidden_scale` [M, F] multiplies the activated hidden rows, in
    sorted order (dropout; no gradient).
    Returns: differentiable in x, the combine weights and all expert weights.
    """
    chosen = BACKENDS[choose_backend(backend, x)[0]]
    own = weights if hasattr(chosen, "takes_wide_weights") else weights.in_dtype(x.dtype)
    return chosen.expert_mlp(x, plan, combine_weights, own, hidden_scale)


def expert_mlp_sorted(
    rows: Float[Tensor, "M D"],
    counts: Int64[Tensor, "E"],
    weights: ExpertWeights,
    backend: str | None = None,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "M D"]:
    """Return each sorted row's expert output [M, D] -> [M, D]; `counts` [E]: what an all-to-all leaves on
    a rank.
    """
    chosen = BACKENDS[choose_backend(backend, rows)[0]]
    own = weights if hasattr(chosen, "takes_wide_weights") else weights.in_dtype(rows.dtype)
    return chosen.expert_mlp_sorted(rows, counts, own, hidden_scale)
