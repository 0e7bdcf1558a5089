"""The two pieces of data that every expert backend takes: where the rows are, and the stacked weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int64, Num
from torch import Tensor

from gatewright.kernels.int8 import dequantise


@dataclass(frozen=True)
class DispatchPlan:
    """Which token rows go to which expert, as two views of one counting sort.

    Sorted view: `token_ids` [M] int64, the token of each kept assignment, grouped by expert in ascending
    expert id and, inside an expert, in position order; `counts` [E] int64, rows per expert, so that
    `counts.sum() == M`. Inverse view: `slots` [T, K] int64, the sorted row that holds a token's k-th choice,
    -1 where it was dropped or never made. With it, combining is a gather and a sum, and the gradient of
    dispatching is too. `all_kept` True promises that no slot is -1.

    A static plan keeps a row for every place, those without an expert behind the last expert's: then
    `counts.sum() <= M`, and rows beyond that sum mean nothing. `weight_side` says whether a combine weight
    multiplies what an expert returns or what it is given. `capacity` is the most rows that any expert can
    hold, known without looking at the numbers; None promises only what a token can do, one row per expert.
    """

    token_ids: Int64[Tensor, "M"]
    counts: Int64[Tensor, "E"]
    slots: Int64[Tensor, "T K"]
    all_kept: bool
    weight_side: Literal["output", "input"] = "output"
    capacity: int | None = None

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens before dispatch."""
        return self.slots.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[0]


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights of E experts, with or without biases.

    `w_in` is `w_gate_up` [E, 2F, D] (gate rows first) for gated activations, else `w_up` [E, F, D]; `w_down`
    is [E, D, F]; `b_in` [E, 2F or F] and `b_down` [E, D] are added to what the two give. int8 matrices have
    `scale_in` [E, 2F or F] and `scale_down` [E, D], what their rows are multiplied with, and fp32 biases.
    """

    w_in: Num[Tensor, "E H D"]
    w_down: Num[Tensor, "E D F"]
    activation: str
    b_in: Float[Tensor, "E H"] | None = None
    b_down: Float[Tensor, "E D"] | None = None
    scale_in: Float32[Tensor, "E H"] | None = None
    scale_down: Float32[Tensor, "E D"] | None = None

    def in_dtype(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the same weights in another dtype, with their gradients; int8 ones multiplied out."""
        b_in = None if self.b_in is None else self.b_in.to(dtype)
        b_down = None if self.b_down is None else self.b_down.to(dtype)
        if self.scale_in is None or self.scale_down is None:
            w_in, w_down = self.w_in.to(dtype), self.w_down.to(dtype)
        else:
            w_in = dequantise(self.w_in, self.scale_in, dtype)
            w_down = dequantise(self.w_down, self.scale_down, dtype)
        return ExpertWeights(w_in, w_down, self.activation, b_in, b_down)
