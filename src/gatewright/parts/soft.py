"""SoftMoELayer: experts compute mixtures of a sequence's tokens, so that nothing is selected or dropped."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import ExpertWeights, choose_backend, expert_mlp_sorted
from gatewright.parts.experts import Experts
from gatewright.parts.stats import Stats

_EPSILON = 1e-6


class SoftMoELayer(nn.Module):
    """A feed-forward layer of E experts with p slots each, [..., S, D] -> ([..., S, D], Stats).

    Equation (Puigcerver et al. 2023, eq 1-2), for the tokens X [S, D] of one sequence and Phi [D, E p]:
    A = X Phi; dispatch = softmax of A over tokens; slots X~ = dispatch^T X; Y~_i = f_{floor(i / p)}(X~_i);
    combine = softmax of A over slots; Y = combine Y~. With `normalised` (section 2.3, for wide models)
    A = l2norm(X) (scale l2norm(Phi)) with a learned scalar `scale`, 1 at first; slots mix X itself.
    Args: x [..., S, D], at least [S, D], each [S, D] a sequence of its own; `mask` [..., S] bool, False =
    padding, which enters no slot and gets 0. S may vary: the cost is that of E p slots.
    Returns: y in the dtype of x (of autocast, where it is on), and an empty Stats: no token is assigned, all
    slots are full, and there is no balance to lose.
    Not causal: every token reaches every slot, so that y_t depends on later tokens.
    Differs: l2norm(v) = v / sqrt(|v|^2 + 1e-6), the constant inside the root as in the authors' code (the
    paper has it outside). Logits, both softmaxes and both mixtures are computed in at least fp32.
    Raises: UserError for sizes below 1, an unknown activation or backend, and a mask of another shape.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        slots_per_expert: int,
        expert_width: int,
        activation: str = "gelu",
        *,
        normalised: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if min(width, num_experts, slots_per_expert, expert_width) < 1:
            raise UserError(
                f"width {width}, num_experts {num_experts}, slots_per_expert {slots_per_expert}, "
                f"expert_width {expert_width}; allowed: 1 or more of each; one slot per expert is usual"
            )
        choose_backend(backend)
        self.num_experts, self.slots_per_expert, self.backend = num_experts, slots_per_expert, backend
        self.phi = nn.Parameter(torch.empty(width, num_experts * slots_per_expert))
        self.scale = nn.Parameter(torch.ones(())) if normalised else None
        self.experts = Experts(width, num_experts, expert_width, activation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Phi from a normal of std width ** -0.5, the experts as they do, and set the scale to 1."""
        nn.init.normal_(self.phi, std=self.phi.shape[0] ** -0.5)
        if self.scale is not None:
            nn.init.ones_(self.scale)
        self.experts.reset_parameters()

    def logits(self, x: Float[Tensor, "*batch S D"]) -> Float[Tensor, "*batch S slots"]:
        """Return A, in at least fp32 and in fp64 for fp64 input."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, phi = x.to(wide), self.phi.to(wide)
            if self.scale is not None:
                x = x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + _EPSILON)
                phi = phi * torch.rsqrt((phi * phi).sum(dim=0, keepdim=True) + _EPSILON)
                phi = phi * self.scale.to(wide)
            return x @ phi

    def forward(
        self, x: Float[Tensor, "*batch S D"], mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "*batch S D"], Stats]:
        """Return (y, empty Stats)."""
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise UserError(
                f"mask {mask.dtype} {tuple(mask.shape)} for x {tuple(x.shape)}; allowed: torch.bool "
                f"{tuple(x.shape[:-1])}; give one value per token"
            )
        kind = x.device.type
        batch = math.prod(x.shape[:-2])
        rows = x.reshape(batch, *x.shape[-2:])
        real = None if mask is None else mask.reshape(batch, x.shape[-2], 1)
        if real is not None:
            # Padding may hold NaN: where, not multiply, keeps it out of values and gradients.
            rows = torch.where(real, rows, 0)
        logits = self.logits(rows)
        # Not -inf: a sequence of nothing but padding would divide 0 by 0.
        lowest = torch.finfo(logits.dtype).min
        dispatch = torch.softmax(logits if real is None else logits.masked_fill(~real, lowest), dim=1)
        with torch.autocast(kind, enabled=False):
            slots = dispatch.mT @ rows.to(logits.dtype)
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out = self._experts_of(slots.to(x.dtype if x.dtype == torch.float64 else narrow))
        with torch.autocast(kind, enabled=False):
            y = (torch.softmax(logits, dim=-1) @ out.to(logits.dtype)).to(out.dtype)
        if real is not None:
            y = torch.where(real, y, 0)
        return y.reshape(x.shape), Stats()

    def _experts_of(self, slots: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Return each slot's expert output; slot i belongs to expert floor(i / p)."""
        batch, width = slots.shape[0], slots.shape[-1]
        each = batch * self.slots_per_expert
        by_expert = slots.view(batch, self.num_experts, self.slots_per_expert, width).transpose(0, 1)
        counts = torch.full((self.num_experts,), each, dtype=torch.int64, device=slots.device)
        experts = self.experts
        weights = ExpertWeights(
            experts.w_in.to(slots.dtype), experts.w_down.to(slots.dtype), experts.activation
        )
        out = expert_mlp_sorted(by_expert.reshape(-1, width), counts, weights, self.backend)
        by_expert = out.view(self.num_experts, batch, self.slots_per_expert, width)
        return by_expert.transpose(0, 1).reshape(slots.shape)
