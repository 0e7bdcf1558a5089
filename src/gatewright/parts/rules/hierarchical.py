"""Two levels of noisy top-K gating: first groups of experts, then experts inside each chosen group."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.parts.draws import call_key, fold
from gatewright.parts.maps import linear_maps
from gatewright.parts.noise import (
    PRIMARY_NOISE,
    SoftplusNoise,
    gate_totals,
    load_total,
)
from gatewright.parts.router import Routed, Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, select_top
from gatewright.parts.rules.registry import RouterInfo, register

# T2T's guard, for a group that no token chose.
_NO_TOKENS = 1e-10


@dataclass(frozen=True)
class _Level:
    """One level's logits without and with noise, and the noise's standard deviation (none without noise)."""

    clean: Tensor
    noisy: Tensor
    std: Tensor | None


def two_levels(
    num_experts: int, num_selected: int, num_groups: int | None = None, num_primary: int | None = None
) -> tuple[int, int]:
    """Return (a, K1): the groups, and how many of them a token uses.

    None takes the least divisor of E of sqrt(E) or more for a, and for K1 that factor of K which is nearest
    to K / K1, the smaller one first, and makes no constant gate.
    Raises: UserError where a does not divide E, and where no K1, or not the given one, will do.
    """
    check_selection(num_experts, num_selected, "softmax_selected")
    divisors = [a for a in range(1, num_experts + 1) if num_experts % a == 0]
    a = next(a for a in divisors if a * a >= num_experts) if num_groups is None else num_groups
    if a not in divisors:
        raise UserError(
            f"num_groups {a} with num_experts {num_experts}; allowed: {', '.join(map(str, divisors))}; "
            "all groups hold as many experts"
        )
    allowed = [
        first
        for first in range(1, num_selected + 1)
        if num_selected % first == 0
        and _level_allowed(first, a)
        and _level_allowed(num_selected // first, num_experts // a)
    ]
    if not allowed or num_primary not in (None, *allowed):
        given = "" if num_primary is None else f", num_primary {num_primary}"
        fitting = f"num_primary {', '.join(map(str, allowed))}" if allowed else "K = 2 x 2 and more"
        raise UserError(
            f"num_selected {num_selected}{given} with {a} groups of {num_experts // a} experts; allowed: "
            f"{fitting}; one choice of many at a level makes its gate exactly 1"
        )
    if num_primary is None:
        num_primary = min(allowed, key=lambda first: (abs(first - num_selected // first), first))
    return a, num_primary


def _level_allowed(num_selected: int, num_choices: int) -> bool:
    return num_selected <= num_choices and (num_selected > 1 or num_choices == 1)


class HierarchicalRouter(Router):
    """Noisy top-K gating on two levels: a groups of b experts, K1 groups per token, K2 experts in each.

    Equation: Shazeer et al. 2017 appendix B: (12) y = sum_ij Gprim(x)_i G_i(x)_j E_ij(x), both G noisy top-K
    gates (eq 3-5); (13) sums["importance"]_ij = sum_x Gprim(x)_i G_i(x)_j; (14) sums["load"]_ij = Loadprim_i
    Load_i(X_i)_j / (|X_i| + 1e-10), X_i the tokens that chose group i, each load by eq 8-10. Sums are kept
    in training with noise only. `primary` [a, D] and `weight` [E, D] are the two W_g; expert i b + j is E_ij.
    Logits [T, E] are h_i + log softmax(s_i)_j, whose softmax is the product of the two full softmaxes. With
    one group there is no first level: exactly `noisy_top_k`.
    Args: `num_groups` a and `num_primary` K1 as in `two_levels`, K = K1 K2; `noise` False routes without;
    `zero_init` starts both W_g at 0 as the paper does; `epsilon` is added to the noise's standard deviations
    (T2T: 1e-2; the paper: 0).
    Raises: UserError for sizes that do not divide, and for a level with one choice of many (a constant gate).
    Differs: the logits of groups that a token does not choose are computed too.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_selected: int,
        dtype: torch.dtype = torch.float32,
        *,
        num_groups: int | None = None,
        num_primary: int | None = None,
        noise: bool = True,
        zero_init: bool = True,
        epsilon: float = 0.0,
    ) -> None:
        self.num_groups, self.num_primary = two_levels(num_experts, num_selected, num_groups, num_primary)
        self.num_secondary, self.zero_init = num_selected // self.num_primary, zero_init
        super().__init__(
            width, num_experts, dtype, noise=SoftplusNoise(width, num_experts, epsilon) if noise else None
        )
        self.keeps_initialisation = zero_init
        a = self.num_groups
        self.primary = nn.Parameter(torch.empty(a, width)) if a > 1 else None
        self.primary_noise = SoftplusNoise(width, a, epsilon) if a > 1 and noise else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Set both W_g to 0; without `zero_init`, or with an `std`, draw them. Both W_noise are set to 0."""
        super().reset_parameters(std)
        if not hasattr(self, "primary_noise"):  # the base class calls this before there is one
            return
        if self.primary is not None:
            std_primary = self.primary.shape[1] ** -0.5 if std is None else std
            nn.init.trunc_normal_(self.primary, std=std_primary, a=-2 * std_primary, b=2 * std_primary)
        for weight in (self.weight, self.primary):
            if self.zero_init and std is None and weight is not None:
                nn.init.zeros_(weight)
        for noise in (self.noise, self.primary_noise):
            if isinstance(noise, SoftplusNoise):
                noise.reset_parameters()

    def primary_logits(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T A"]:
        """Return the logits of the a groups, [T, D] -> [T, a], without noise; one group has logit 0."""
        wide = torch.float64 if x.dtype == torch.float64 else self.dtype
        if self.primary is None:
            return x.new_zeros(x.shape[0], 1, dtype=wide)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.primary.to(wide))

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return joint logits [T, E], without noise."""
        return self._joint(self.primary_logits(x), super().forward(x))

    def route(self, x: Float[Tensor, "T D"], call: RoutingCall) -> Routed:
        """Return joint logits and scores, and the Assignment of T tokens."""
        primary, secondary = self._levels(x, call)
        logits = self._joint(primary.noisy, secondary.noisy)
        scores = self.scores(logits)
        groups = select_top(primary.noisy, self.num_primary)
        inner = self._of_groups(secondary.noisy, groups)
        picks = select_top(inner.flatten(0, 1), self.num_secondary).view(*groups.shape, self.num_secondary)
        first = torch.softmax(primary.noisy.gather(1, groups), dim=-1).unsqueeze(-1)
        weights = (first * torch.softmax(inner.gather(2, picks), dim=-1)).flatten(1)
        experts = (groups.unsqueeze(-1) * inner.shape[-1] + picks).flatten(1)
        # By id, then stably by weight: among equals the lowest id comes first.
        experts, by_id = torch.sort(experts, dim=1)
        weights = weights.gather(1, by_id)
        falling = torch.sort(weights.detach(), dim=1, descending=True, stable=True).indices
        experts, weights = experts.gather(1, falling), weights.gather(1, falling)
        if call.mask is not None:
            experts = torch.where(call.mask.unsqueeze(-1), experts, -1)
        assignment = Assignment(experts, weights, logits.shape[1])
        if secondary.std is not None:
            load = self._load(primary, secondary, groups, picks, call)
            sums = {"importance": gate_totals(assignment), "load": load}
            assignment = dataclasses.replace(assignment, sums=sums)
        return Routed(logits, scores, scores, assignment)

    def _levels(self, x: Tensor, call: RoutingCall) -> tuple[_Level, _Level]:
        """Return both levels' logits; in training with noise, which the two draw apart."""
        if not (call.training and isinstance(self.noise, SoftplusNoise)):
            primary, secondary = self.primary_logits(x), super().forward(x)
            return _Level(primary, primary, None), _Level(secondary, secondary, None)
        key = call_key(call, x.device)
        call = dataclasses.replace(call, key=key)
        wide = torch.float64 if x.dtype == torch.float64 else self.dtype
        weights = [self.weight, self.noise.weight]
        if self.primary is not None and self.primary_noise is not None:
            weights += [self.primary, self.primary_noise.weight]
        secondary, mapped, *first = linear_maps(x, weights, wide)
        second = _Level(secondary, *self.noise.on_mapped(x, secondary, (mapped,), call))
        if self.primary_noise is None:
            primary = self.primary_logits(x)
            return _Level(primary, primary, None), second
        call = dataclasses.replace(call, key=fold(key, PRIMARY_NOISE))
        return _Level(first[0], *self.primary_noise.on_mapped(x, first[0], first[1:], call)), second

    def _joint(self, primary: Tensor, secondary: Tensor) -> Tensor:
        """Return h_i + log softmax(s_i)_j, [T, E]."""
        if self.primary is None:
            return secondary
        inside = secondary.view(secondary.shape[0], self.num_groups, self._inside)
        return _Joint.apply(primary, inside).flatten(1)

    @property
    def _inside(self) -> int:
        return self.weight.shape[0] // self.num_groups

    def _of_groups(self, values: Tensor, groups: Int64[Tensor, "T K"]) -> Tensor:
        """Return the experts' values [T, E] inside the chosen groups, [T, K1, b]."""
        index = groups.unsqueeze(-1).expand(*groups.shape, self._inside)
        return values.view(-1, self.num_groups, self._inside).gather(1, index)

    def _load(
        self, primary: _Level, secondary: _Level, groups: Tensor, picks: Tensor, call: RoutingCall
    ) -> Tensor:
        """Return eq 14, [E]."""
        wide = torch.promote_types(primary.clean.dtype, torch.float32)
        a, num_tokens = self.num_groups, groups.shape[0]
        used = torch.zeros(num_tokens, a, dtype=torch.bool, device=groups.device).scatter(1, groups, True)
        used = used if call.mask is None else used & call.mask.unsqueeze(-1)
        tokens = used.sum(dim=0, dtype=torch.int32).to(wide)
        if primary.std is None:
            first = tokens
        else:
            given = (primary.clean, primary.noisy, primary.std)
            first = load_total(*given, self.num_primary, True, groups, call.mask).squeeze(0)
        assert secondary.std is not None
        # A group that a token did not choose is a row that is left out; what it names does not matter.
        index = groups.unsqueeze(-1).expand_as(picks)
        named = picks.new_zeros(num_tokens, a, self.num_secondary).scatter(1, index, picks)
        clean, noisy, std = (
            values.view(num_tokens * a, self._inside)
            for values in (secondary.clean, secondary.noisy, secondary.std)
        )
        second = load_total(
            clean, noisy, std, self.num_secondary, True, named.flatten(0, 1), used.flatten(), groups=a
        )
        return ((first / (tokens + _NO_TOKENS)).unsqueeze(-1) * second).flatten()


class _Joint(torch.autograd.Function):
    """h_i + log softmax(s_i)_j, [T, a] and [T, a, b] -> [T, a, b]: torch's is slow over so few numbers."""

    @staticmethod
    def forward(ctx: Any, primary: Tensor, secondary: Tensor) -> Tensor:
        shift = secondary - secondary.amax(dim=-1, keepdim=True)
        shift = shift.sub_(shift.exp().sum(dim=-1, keepdim=True).log_())
        ctx.save_for_backward(shift)
        return shift + primary.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (shift,) = ctx.saved_tensors
        total = gradient.sum(dim=-1)
        return total, torch.addcmul(gradient, shift.exp(), total.unsqueeze(-1), value=-1)


register(
    RouterInfo(
        name="hierarchical",
        scores="softmax over groups times softmax inside, both noisy",
        selection="each token its best groups, and the best experts in each",
        weights="product of the softmaxes over the chosen",
        capacity="none",
        losses=("importance", "load"),
        causal=True,
        used_by="Sparsely-Gated MoE (2017)",
        source="Shazeer et al. 2017 eq 12-14",
        make=HierarchicalRouter,
    )
)
