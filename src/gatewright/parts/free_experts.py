"""Zero-computation experts beside the feed-forward ones: nothing, the token itself, or almost a constant."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import DispatchPlan
from gatewright.parts.experts import Experts, fan_in_normal
from gatewright.parts.router import Router
from gatewright.parts.stats import Stats

KINDS = ("zero", "copy", "constant")


class FreeExperts(nn.Module):
    """Feed-forward experts and free ones under one numbering: ids from `ffn.num_experts` on are the kinds in
    `free`, in order. No row is gathered for a free expert.

    Equation (MoE++, section 3.1): zero E(x) = 0; copy E(x) = x; constant E(x) = a1 x + a2 v, (a1, a2) =
    softmax(W_c x), with `w_constant` [J, 2, D] and `v_constant` [J, D] for J constant experts. The layer and
    its router count all of them: num_experts = ffn.num_experts + len(free).
    Args: `ffn` is `Experts`, or any experts module with `num_experts`; then `width` says D.
    Raises: UserError for an unknown kind or none at all.
    Differs: the authors' code sets a zero expert's gate to 0 before it renormalises, which gives its partner
    the weight 1; here a weight is what the rule says, as in the paper. Neither names an initialisation of
    W_c and v: both are drawn by fan-in.
    """

    takes_key = True

    def __init__(
        self, ffn: nn.Module, free: Sequence[str] = ("zero", "copy", "constant"), *, width: int | None = None
    ) -> None:
        super().__init__()
        for kind in free:
            if kind not in KINDS:
                raise UserError(
                    f"free expert {kind!r} is unknown{did_you_mean(kind, KINDS)}; allowed: {', '.join(KINDS)}"
                )
        if width is None and isinstance(ffn, Experts):
            width = ffn.width
        if not free or width is None:
            raise UserError(
                f"free experts {list(free)}, width {width}; allowed: one kind or more, and a width for ffn "
                "modules other than Experts"
            )
        self.ffn, self.free, self.width = ffn, tuple(free), width
        self.num_ffn: int = ffn.num_experts  # type: ignore[assignment]
        self.num_experts = self.num_ffn + len(free)
        constants = [j for j, kind in enumerate(free) if kind == "constant"]
        self.num_constant = len(constants)
        self.w_constant = self.v_constant = None
        if constants:
            self.w_constant = nn.Parameter(torch.empty(len(constants), 2, width))
            self.v_constant = nn.Parameter(torch.empty(len(constants), width))
        # By free expert, and last for no free expert: 0 copy, 1 .. J the constants, J + 1 nothing to add.
        nothing = len(constants) + 1
        column = {"zero": nothing, "copy": 0}
        columns = [column[k] if k != "constant" else 1 + constants.index(j) for j, k in enumerate(free)]
        self.register_buffer("_columns", torch.tensor([*columns, nothing]), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the constant experts' weights by fan-in; the feed-forward experts keep theirs."""
        if self.w_constant is not None and self.v_constant is not None:
            fan_in_normal(self.w_constant)
            fan_in_normal(self.v_constant)

    def routers(self) -> dict[str, Router]:
        """Return the routers inside the feed-forward experts, as Stats names them."""
        inner: dict[str, Router] = getattr(self.ffn, "routers", dict)()
        return inner

    def forward(
        self,
        x: Float[Tensor, "T D"],
        plan: DispatchPlan,
        combine_weights: Float[Tensor, "T K"],
        backend: str | None = None,
        *,
        key: Int64[Tensor, ""] | None = None,
    ) -> Float[Tensor, "T D"] | tuple[Float[Tensor, "T D"], Stats]:
        """Return y [T, D], or (y, Stats) where the feed-forward experts return both."""
        if plan.num_experts != self.num_experts:
            raise UserError(
                f"a plan for {plan.num_experts} experts, {self.num_ffn} feed-forward and {len(self.free)} "
                f"free; allowed: {self.num_experts}; the layer's num_experts counts both"
            )
        keyed = {"key": key} if getattr(self.ffn, "takes_key", False) else {}
        ends = plan.counts.cumsum(0)
        found = self.ffn(x, self._ffn_plan(plan, ends), combine_weights, backend, **keyed)
        y, stats = found if isinstance(found, tuple) else (found, None)
        y = self._add_free(y, x, plan, ends, combine_weights)
        return y if stats is None else (y, stats)

    def _ffn_plan(self, plan: DispatchPlan, ends: Tensor) -> DispatchPlan:
        """Return the part of the plan that the feed-forward experts compute: its first rows."""
        last = ends[self.num_ffn - 1]
        token_ids, all_kept = plan.token_ids, False
        static = not plan.all_kept and token_ids.shape[0] == plan.slots.numel()
        if not static:
            token_ids = token_ids[: int(last)]
            all_kept = plan.all_kept and token_ids.shape[0] == plan.token_ids.shape[0]
        return dataclasses.replace(
            plan,
            token_ids=token_ids,
            counts=plan.counts[: self.num_ffn],
            slots=torch.where(plan.slots < last, plan.slots, -1),
            all_kept=all_kept,
        )

    def _add_free(
        self, y: Tensor, x: Tensor, plan: DispatchPlan, ends: Tensor, combine_weights: Tensor
    ) -> Tensor:
        """Return y plus what the free experts give, summed in at least fp32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = combine_weights.to(wide)
        expert = torch.bucketize(plan.slots, ends, right=True)
        place = torch.where((plan.slots >= 0) & (expert >= self.num_ffn), expert - self.num_ffn, -1)
        columns: Tensor = self._columns  # type: ignore[assignment]
        column = columns[place]
        of_x = torch.where(column == 0, weights, 0)
        if self.w_constant is None or self.v_constant is None:
            return _scaled_sum(y, x.to(wide), of_x.sum(dim=1), None)
        x, count = x.to(wide), self.num_constant
        is_constant = (column > 0) & (column <= count)
        which = torch.where(is_constant, column - 1, 0)
        with torch.autocast(x.device.type, enabled=False):
            logits = x @ self.w_constant.to(wide).flatten(0, 1).t()
            chosen = logits.unflatten(1, (count, 2)).gather(1, which.unsqueeze(-1).expand(-1, -1, 2))
            if plan.weight_side == "input":  # the expert is given w x, so its own logits are w W_c x
                share = torch.softmax(chosen * weights.unsqueeze(-1), dim=-1)
                of_v = share[..., 1]
            else:
                share = torch.softmax(chosen, dim=-1)
                of_v = share[..., 1] * weights
            of_x = of_x + torch.where(is_constant, share[..., 0] * weights, 0)
            by_constant = of_v.new_zeros(x.shape[0], count).scatter_add(
                1, which, torch.where(is_constant, of_v, 0)
            )
            return _scaled_sum(y, x, of_x.sum(dim=1), by_constant @ self.v_constant.to(wide))


def _scaled_sum(y: Tensor, x: Tensor, scale: Tensor, more: Tensor | None) -> Tensor:
    """Return y + scale * x + more in y's dtype; all but y are at least fp32, and so is the sum."""
    total = torch.addcmul(y.to(scale.dtype), x, scale.unsqueeze(-1))
    return (total if more is None else total + more).to(y.dtype)
