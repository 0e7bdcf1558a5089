"""MoELayer: the whole flow of a Mixture-of-Experts layer."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import DispatchPlan, choose_backend
from gatewright.parts.capacity import Capacity
from gatewright.parts.dispatch import make_plan
from gatewright.parts.experts import MLP, Experts
from gatewright.parts.groups import check_group_size, tokens_of_groups
from gatewright.parts.record import record_call
from gatewright.parts.reroute import reroute
from gatewright.parts.router import Routed, Router
from gatewright.parts.routing import Assignment, RoutingCall, WeightForm, check_selection
from gatewright.parts.rules import TokenChoice, build_router
from gatewright.parts.stats import Stats


class MoELayer(nn.Module):
    """A drop-in feed-forward layer of E experts of which each token uses K: x [..., D] -> (y [..., D],
    Stats).

    1. router: x -> logits -> scores, in at least fp32 by default
    2. selection rule: scores -> Assignment (experts and weights of every token)
    3. plan: Assignment -> DispatchPlan (sorted by expert; beyond capacity dropped)
    4. experts and combine: y_t = sum_k weight[t, k] FFN_{expert[t, k]}(x_t), dropped choices adding zero
    5. shared experts: one plain MLP that every token passes, added with weight 1

    Args: `router` is a name of `gatewright routers`, a Router with a rule, or None: token choice by softmax
    with `weights` as its form. `capacity_factor` f gives C = ceil(f K T / E) over each routing group,
    `capacity` says more (`Capacity`); both None is the router's own, which is mostly dropless. `group_size`:
    tokens per routing group, "sequence" for each text of x, None for all of the call. `router_dtype` is what
    the router computes in (for a Router that is given, its own holds); `num_shared_experts` n makes the
    shared MLP n * expert_width wide;
    `experts` and `shared` replace the modules built here, which take `expert_bias`, `expert_dropout` and
    `init_scale` (see `Experts`); `backend` as `kernels.choose_backend`.
    Equation: Switch Transformer eq 2 ("raw"), Mixtral section 2.1 ("renormalised", the default).
    Raises: UserError for K outside 1..E, an unknown name, or a weight form that cannot train the router.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_selected: int,
        expert_width: int,
        *,
        activation: str = "swiglu",
        weights: WeightForm = "renormalised",
        num_shared_experts: int = 0,
        capacity_factor: float | None = None,
        router_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        router: str | Router | None = None,
        capacity: Capacity | None = None,
        group_size: int | Literal["sequence"] | None = None,
        experts: nn.Module | None = None,
        shared: nn.Module | None = None,
        expert_bias: bool = False,
        expert_dropout: float = 0.0,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if min(width, expert_width) < 1 or num_shared_experts < 0:
            raise UserError(
                f"width {width}, expert_width {expert_width}, num_shared_experts {num_shared_experts}; "
                "allowed: widths of 1 or "
                "more, shared experts of 0 or more"
            )
        if group_size != "sequence":
            check_group_size(group_size)
        choose_backend(backend)
        if router is None:
            check_selection(num_experts, num_selected, weights)
            rule = TokenChoice(num_selected, weights)
            router = Router(width, num_experts, router_dtype, rule=rule)
        elif isinstance(router, str):
            router = build_router(router, width, num_experts, num_selected, dtype=router_dtype)
        self.num_experts, self.num_selected, self.weights = num_experts, num_selected, weights
        self.backend, self.group_size = backend, group_size
        self.router = router
        self.capacity = _capacity(capacity, capacity_factor, router.capacity)
        if experts is None:
            experts = Experts(
                width,
                num_experts,
                expert_width,
                activation,
                bias=expert_bias,
                dropout=expert_dropout,
                init_scale=init_scale,
            )
        if shared is None and num_shared_experts:
            hidden = num_shared_experts * expert_width
            shared = MLP(width, hidden, activation, bias=expert_bias, init_scale=init_scale)
        self.experts, self.shared = experts, shared

    @property
    def capacity_factor(self) -> float | None:
        """f in training; None is dropless."""
        return None if self.capacity is None else self.capacity.factor

    def routers(self) -> dict[str, Router]:
        """Return this layer's router, and those of experts that are MoE layers, as Stats names them."""
        inner = getattr(self.experts, "routers", dict)
        return {"router": self.router, **inner()}

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        mask: Tensor | None = None,
        capture: bool = False,
        *,
        key: Int64[Tensor, ""] | None = None,
        token_ids: Tensor | None = None,
        with_stats: bool = True,
    ) -> tuple[Float[Tensor, "*batch D"], Stats]:
        """Return (y, Stats). `mask` [...] bool: False = padding, which takes no capacity, enters no
        statistic and gets 0.

        Args: `key` 0-d int64 fixes all noise and coins of this call (None draws one from torch's own
        generator, in training only); `token_ids` [...] int64 are what hash rules look at; without
        `with_stats` Stats are empty, which spares a decoder of one token at a time their sums.
        """
        flat, call = self._call(x, mask, key, token_ids)
        routed = self.router.route(flat, call)
        sent, plan = self._plan(routed, call)
        wide = _activation_dtype(flat)
        keyed = {"key": key} if getattr(self.experts, "takes_key", False) else {}
        y, inner = _experts_and_stats(self.experts(wide, plan, sent.weights, self.backend, **keyed))
        if self.shared is not None:
            own = self.shared(flat)
            # With biases, padding would not give 0.
            y = y + (own if call.mask is None else torch.where(call.mask.unsqueeze(-1), own, 0))
        if not with_stats:
            return y.reshape(x.shape), Stats()
        record = record_call(routed, plan, call.mask, call.stats_size, capture, sent)
        return y.reshape(x.shape), Stats({"router": record}) | inner

    def _call(
        self, x: Tensor, mask: Tensor | None, key: Tensor | None, token_ids: Tensor | None
    ) -> tuple[Tensor, RoutingCall]:
        """Return the tokens as [T, D] with padding zeroed, and what the router may know of the call."""
        for name, given in (("mask", mask), ("token_ids", token_ids)):
            kind = torch.bool if name == "mask" else torch.int64
            if given is not None and (given.dtype != kind or given.shape != x.shape[:-1]):
                raise UserError(
                    f"{name} {given.dtype} {tuple(given.shape)} for x {tuple(x.shape)}; allowed: {kind} "
                    f"{tuple(x.shape[:-1])}; "
                    "give one value per token"
                )
        flat = x.reshape(-1, x.shape[-1])
        flat_mask = None if mask is None else mask.reshape(-1)
        if flat_mask is not None:
            # Padding may hold NaN: where, not multiply, keeps it out of values and gradients.
            flat = torch.where(flat_mask.unsqueeze(-1), flat, 0)
        ids = None if token_ids is None else token_ids.reshape(-1)
        sequence = x.shape[-2] if x.dim() > 2 else None
        group = sequence or None if self.group_size == "sequence" else self.group_size
        return flat, RoutingCall(flat_mask, self.training, key, ids, group, group or sequence)

    def _plan(self, routed: Routed, call: RoutingCall) -> tuple[Assignment, DispatchPlan]:
        """Return where the choices are sent, and the plan of it; dropless unless there is a capacity."""
        static = torch.compiler.is_compiling() or choose_backend(self.backend)[0] == "padded"
        capacity, sent, kept = self.capacity, routed.assignment, None
        if capacity is None or capacity.factor_in(self.training) is None:
            return sent, make_plan(sent, static=static)
        limit, most = self._limit(capacity, sent.num_tokens, call)
        if capacity.reroute:
            sent, kept = reroute(routed, limit, call.group_size, capacity.order)
        plan = make_plan(
            sent,
            limit,
            group_size=call.group_size,
            order=capacity.order,
            static=static,
            kept=kept,
            most=most,
        )
        return sent, plan

    def _limit(self, capacity: Capacity, num_tokens: int, call: RoutingCall) -> tuple[int | Tensor, int]:
        """Return the places of each expert, one number or one per routing group, and the most of any."""
        mask, group_size = call.mask, call.group_size
        size = num_tokens if group_size is None else min(group_size, num_tokens)
        most = capacity.places(self.num_selected, size, self.num_experts, self.training)
        if mask is None and (size == 0 or num_tokens % size == 0):
            return most, most
        tokens = tokens_of_groups(mask, num_tokens, group_size, self.router.weight.device)
        return capacity.places_of_groups(self.num_selected, tokens, self.num_experts, self.training), most


def _capacity(capacity: Capacity | None, factor: float | None, own: Capacity | None) -> Capacity | None:
    """Return the capacity that holds: the one given, else the router's own, with the factor if one is."""
    capacity = own if capacity is None else capacity
    if factor is None:
        return capacity
    return Capacity(factor) if capacity is None else capacity.with_factor(factor)


def _experts_and_stats(result: Tensor | tuple[Tensor, Stats]) -> tuple[Tensor, Stats]:
    """Return (y, Stats) of experts that may be MoE layers themselves."""
    return result if isinstance(result, tuple) else (result, Stats())


def _activation_dtype(x: Tensor) -> Tensor:
    """Under autocast, cast to its dtype: the experts' grouped matmuls are not on autocast's own list."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:  # autocast leaves fp64 alone
        return x
    return x.to(torch.get_autocast_dtype(kind))
