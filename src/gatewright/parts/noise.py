"""What perturbs a router in training so that it explores, and the smooth counts that noise makes possible."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.parts.draws import call_key, fold, normal, runs_native
from gatewright.parts.jitter import jittered
from gatewright.parts.maps import linear_maps
from gatewright.parts.router import Noise, Routed, Spread
from gatewright.parts.routing import Assignment, RoutingCall, select_top

# What a call's key is folded with: one number for each use, so that no two share their draws.
INPUT_NOISE, LOGIT_NOISE, CHOICE_NOISE, PRIMARY_NOISE = 1, 2, 3, 4

# Divisions by a smaller standard deviation give steps, whose gradient is NaN.
LEAST_STD = 1e-6


def load_estimate(
    clean: Float[Tensor, "T E"],
    noisy: Float[Tensor, "T E"],
    std: Float[Tensor, "T E"] | float,
    num_selected: int,
    excluding: bool = True,
    chosen: Int64[Tensor, "T K"] | None = None,
) -> Float[Tensor, "T E"]:
    """Return P [T, E], the probability that expert e is among the K highest of token t once its own noise is
    drawn anew and the others' is kept; with gradient to both logits and to `std`.

    Equation: Shazeer et al. 2017 eq 8-9: Phi((clean_e - kth_excluding(noisy, K, e)) / std_e), the K-th
    highest noisy logit among the others (`excluding`); V-MoE: 1 - Phi((thr - clean_e) / std), thr the K-th
    highest of all, e itself included. Summed over tokens it is the load.
    Args: `std` of the noise, held at 1e-6 or more; `chosen` [T, K] the ids of the K highest noisy logits,
    highest first, where they are known.
    Returns: for K = E ones without gradient, the true counts.
    Differs: V-MoE's code keeps its formula at K = E.
    """
    wide = torch.promote_types(clean.dtype, torch.float32)
    clean, noisy = clean.to(wide), noisy.to(wide)
    if num_selected == clean.shape[-1]:
        return torch.ones_like(clean)
    chosen = select_top(noisy, num_selected) if chosen is None else chosen
    std = std.to(wide).expand_as(clean) if isinstance(std, Tensor) else clean.new_full((), std)
    return _Load.apply(clean, noisy, std, chosen, excluding)


class _Load(torch.autograd.Function):
    """Phi((clean - threshold) / std), std held at LEAST_STD or more.

    Keeps nothing of the size [T, E] beside its arguments and takes a third of the passes of autograd's own.
    """

    @staticmethod
    def forward(
        ctx: Any, clean: Tensor, noisy: Tensor, std: Tensor, chosen: Tensor, excluding: bool
    ) -> Tensor:
        ctx.save_for_backward(clean, noisy, std, chosen)
        ctx.excluding = excluding
        z, _, _ = _standardised(clean, noisy, std, chosen, excluding)
        return z.mul_(0.5**0.5).erf_().add_(1).mul_(0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        clean, noisy, std, chosen = ctx.saved_tensors
        z, spread, rest = _standardised(clean, noisy, std, chosen, ctx.excluding)
        # Densities below exp(-80) count as that: subnormal numbers take a hundred times as long.
        slope = (z * z).mul_(-0.5).clamp_(min=-80).exp_().mul_((2 * math.pi) ** -0.5)
        slope = slope.mul_(gradient).div_(spread)
        moved = slope.sum(dim=1, keepdim=True)
        if rest is None:
            of_noisy = torch.zeros_like(noisy)
        else:
            of_chosen = slope.gather(1, chosen).sum(dim=1, keepdim=True)
            moved = moved - of_chosen
            best = rest.eq_(rest.amax(dim=1, keepdim=True))
            of_noisy = best.mul_(-of_chosen / best.sum(dim=1, keepdim=True))
        of_noisy.scatter_add_(1, chosen[:, -1:], -moved)
        # Products with 0 and 1: filling by a mask costs twenty times as much.
        of_std = z.mul_(slope).neg_().mul_(std.clone().ge_(LEAST_STD)) if ctx.needs_input_grad[2] else None
        return slope, of_noisy, of_std, None, None


def _standardised(
    clean: Tensor, noisy: Tensor, std: Tensor, chosen: Tensor, excluding: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return z = (clean - threshold) / spread, spread, and with `excluding` the logits of the rest."""
    z, rest = clean - noisy.gather(1, chosen[:, -1:]), None
    if excluding:
        # The K chosen have K - 1 others above them and then the best of the rest: the (K + 1)-th of all.
        rest = noisy.scatter(1, chosen, -torch.inf)
        z.scatter_(1, chosen, clean.gather(1, chosen) - rest.amax(dim=1, keepdim=True))
    spread = std.clamp(min=LEAST_STD)
    return z.div_(spread), spread, rest


def total_over_tokens(values: Float[Tensor, "T E"], mask: Bool[Tensor, "T"] | None) -> Float[Tensor, "E"]:
    """Return sums over real tokens, [T, E] -> [E], in at least fp32; padding may hold anything."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return (values if mask is None else torch.where(mask.unsqueeze(-1), values, 0)).sum(dim=0)


def gate_totals(assignment: Assignment) -> Float[Tensor, "E"]:
    """Return sums over tokens of the sparse gates, [E], with gradient: what 2017 calls importance (eq 6)."""
    made = assignment.experts >= 0
    weights = torch.where(made, assignment.weights, 0)
    # Row by row, so that no two numbers meet in an unordered atomic addition.
    sparse = weights.new_zeros(assignment.num_tokens, assignment.num_experts)
    return total_over_tokens(sparse.scatter_add(1, assignment.experts.clamp(min=0), weights), None)


class InputJitter(Noise):
    """Multiplicative noise on what the router sees: x * U(1 - eps, 1 + eps), element by element.

    Equation: Switch Transformer appendix C; ST-MoE table 3 (eps 1e-2). The experts' input stays as it is.
    Args: `eps` in (0, 1).
    Raises: UserError for other `eps`.
    Differs: Switch's pseudo-code (appendix F) adds the noise to the logits; the text, and this, multiply the
    input. transformers' Mixtral changes the tokens in place, so that the experts see it too.
    """

    def __init__(self, eps: float = 1e-2) -> None:
        super().__init__()
        if not 0 < eps < 1:
            raise UserError(f"eps {eps}; allowed: above 0, below 1; the papers' is 0.01, no noise is None")
        self.eps = eps

    def on_input(self, x: Float[Tensor, "T D"], call: RoutingCall) -> Float[Tensor, "T D"]:
        """Return x times its noise, in at least fp32: bf16 holds few factors this close to 1."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return jittered(x.to(wide), fold(call_key(call, x.device), INPUT_NOISE), self.eps)


class LogitNoise(Noise):
    """Normal noise of a fixed standard deviation on the logits, before the scores.

    Equation: V-MoE: g = TOP_K(softmax(W x + n)), n ~ Normal(0, 1 / E^2).
    Args: `std` above 0, None is 1 / E.
    Returns: `sums`: "importance" [E], of softmax over the clean logits; "load" [E], of `load_estimate` with
    the K-th highest of all, K being the rule's places. That is the load of rules that take the K highest
    noisy logits.
    Raises: UserError for a `std` that is not above 0: without noise there is no load to estimate.
    """

    def __init__(self, std: float | None = None) -> None:
        super().__init__()
        if std is not None and not (std > 0 and math.isfinite(std)):
            raise UserError(
                f"std {std}; allowed: above 0, or none for 1 / E; a router without noise has none"
            )
        self.std = std

    def on_logits(
        self, x: Float[Tensor, "T D"], logits: Float[Tensor, "T E"], call: RoutingCall
    ) -> tuple[Float[Tensor, "T E"], Spread]:
        """Return logits + std * normal noise, and std."""
        std = 1 / max(logits.shape[-1], 1) if self.std is None else self.std
        key = fold(call_key(call, x.device), LOGIT_NOISE)
        return logits + normal(key, tuple(logits.shape), x.device, logits.dtype).mul_(std), std

    def sums(
        self, clean: Float[Tensor, "T E"], spread: Spread, routed: Routed, call: RoutingCall
    ) -> Mapping[str, Tensor]:
        """Return "importance" and "load"."""
        shares = torch.softmax(clean.to(torch.promote_types(clean.dtype, torch.float32)), dim=-1)
        load = _total_load(clean, spread, routed, call, excluding=False)
        return {"importance": total_over_tokens(shares, call.mask), "load": load}


class SoftplusNoise(Noise):
    """Normal noise on the logits whose standard deviation each token's router learns.

    Equation: Shazeer et al. 2017 eq 4: H = x W_g + n * softplus(x W_noise), n ~ Normal(0, 1). `weight` [E, D]
    is W_noise, which starts at 0: every standard deviation is then ln 2.
    Args: `epsilon` of 0 or more is added to the standard deviation (T2T: 1e-2).
    Returns: `sums`: "importance" [E], of the sparse gates (eq 6); "load" [E], of `load_estimate` with the
    K-th highest of the others (eq 8-10). That is the load of rules that take the K highest noisy logits.
    Raises: UserError for sizes below 1 and a negative `epsilon`.
    Differs: P divides by 1e-6 at least, where the paper's standard deviation may be 0.
    """

    def __init__(self, width: int, num_experts: int, epsilon: float = 0.0) -> None:
        super().__init__()
        if min(width, num_experts) < 1 or not (epsilon >= 0 and math.isfinite(epsilon)):
            raise UserError(
                f"width {width}, num_experts {num_experts}, epsilon {epsilon}; allowed: sizes of 1 or more, "
                "an epsilon of 0 or more"
            )
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 0, the paper's start."""
        nn.init.zeros_(self.weight)

    def on_logits(
        self, x: Float[Tensor, "T D"], logits: Float[Tensor, "T E"], call: RoutingCall
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """Return H, the noisy logits, and softplus(x W_noise) + epsilon; W_noise computes as W_g does."""
        (mapped,) = linear_maps(x, (self.weight,), logits.dtype)
        return self.on_mapped(x, logits, (mapped,), call)

    def maps(self) -> tuple[Tensor, ...]:
        """Return W_noise: one multiplication by it and W_g costs less than two."""
        return (self.weight,)

    def on_mapped(
        self,
        x: Float[Tensor, "T D"],
        logits: Float[Tensor, "T E"],
        mapped: Sequence[Tensor],
        call: RoutingCall,
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """Return what `on_logits` does, `mapped` being x W_noise."""
        std = F.softplus(mapped[0])
        std = std + self.epsilon if self.epsilon else std
        key = fold(call_key(call, x.device), LOGIT_NOISE)
        return torch.addcmul(logits, std, normal(key, tuple(logits.shape), x.device, logits.dtype)), std

    def sums(
        self, clean: Float[Tensor, "T E"], spread: Spread, routed: Routed, call: RoutingCall
    ) -> Mapping[str, Tensor]:
        """Return "importance" and "load"."""
        load = _total_load(clean, spread, routed, call, excluding=True)
        return {"importance": gate_totals(routed.assignment), "load": load}


def _total_load(clean: Tensor, spread: Spread, routed: Routed, call: RoutingCall, excluding: bool) -> Tensor:
    """Return the load [E] of a rule that took the K highest noisy logits."""
    assert spread is not None
    own = routed.assignment
    # The rows of padding name no expert, and are not summed.
    chosen = own.experts.clamp(min=0)
    return load_total(clean, routed.logits, spread, own.num_selected, excluding, chosen, call.mask).squeeze(0)


def load_total(
    clean: Float[Tensor, "T E"],
    noisy: Float[Tensor, "T E"],
    std: Float[Tensor, "T E"] | float,
    num_selected: int,
    excluding: bool,
    chosen: Int64[Tensor, "T K"],
    mask: Bool[Tensor, "T"] | None,
    groups: int = 1,
) -> Float[Tensor, "G E"]:
    """Return `load_estimate` summed over the real tokens of each of G groups, [G, E]: row t is of group
    t % G. Where C++ runs, there is no [T, E] between.
    """
    if num_selected < clean.shape[-1] and runs_native(clean.numel(), clean, noisy):
        given = std if isinstance(std, Tensor) else clean.new_full((1,), std)
        if given.dtype == torch.float32:
            return _LoadTotal.apply(clean, noisy, given.contiguous(), chosen, mask, excluding, groups)
    load = load_estimate(clean, noisy, std, num_selected, excluding, chosen)
    load = load if mask is None else torch.where(mask.unsqueeze(-1), load, 0)
    return load.view(-1, groups, load.shape[1]).sum(dim=0)


class _LoadTotal(torch.autograd.Function):
    """`_Load` and its sum in one pass each way, in C++."""

    @staticmethod
    def forward(
        ctx: Any,
        clean: Tensor,
        noisy: Tensor,
        std: Tensor,
        chosen: Tensor,
        mask: Tensor | None,
        excluding: bool,
        groups: int,
    ) -> Tensor:
        given = (clean, noisy, std, chosen.contiguous(), None if mask is None else mask.contiguous())
        ctx.save_for_backward(*given)
        ctx.settings = excluding, groups
        return torch.ops.gatewright.load_forward(*given, excluding, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.gatewright.load_backward(
            gradient.contiguous(), *ctx.saved_tensors, *ctx.settings, ctx.needs_input_grad[2]
        )
        of_std = found[2] if ctx.needs_input_grad[2] else None
        return found[0], found[1], of_std, None, None, None, None
