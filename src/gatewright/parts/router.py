"""Router: from tokens to an Assignment. Logits, noise, scores and selection rule, each a part of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import FusedRoute, fused_route
from gatewright.parts.capacity import Capacity
from gatewright.parts.maps import linear_maps
from gatewright.parts.routing import Assignment, RoutingCall, SelectionRule, top_k_of
from gatewright.parts.scores import ScoreFunction, native_name, probabilities, score_function


@dataclass(frozen=True)
class Routed:
    """What a router says of T tokens: `logits` and `scores` [T, E] (after noise), the assignment, and
    `probabilities` [T, E]: the scores normalised over experts, which balance losses are made of.
    """

    logits: Float[Tensor, "T E"]
    scores: Float[Tensor, "T E"]
    probabilities: Float[Tensor, "T E"]
    assignment: Assignment

    def with_sums(self, sums: Mapping[str, Tensor]) -> Routed:
        """Return the same with other sums in its assignment."""
        return dataclasses.replace(self, assignment=dataclasses.replace(self.assignment, sums=sums))

    def totals(self, mask: Tensor | None, group_size: int | None) -> FusedRoute | None:
        """Return the sums over tokens by groups, where the router has taken them already."""
        return None


class FusedRouted(Routed):
    """A Routed whose assignment and sums come from one pass; scores are computed if they are asked for."""

    function: ScoreFunction
    found: FusedRoute
    call: RoutingCall

    def __init__(
        self,
        logits: Tensor,
        function: ScoreFunction,
        assignment: Assignment,
        found: FusedRoute,
        call: RoutingCall,
    ) -> None:
        own = {"logits": logits, "function": function, "assignment": assignment, "found": found, "call": call}
        self.__dict__.update(own)

    @cached_property
    def scores(self) -> Float[Tensor, "T E"]:
        return self.function(self.logits)

    @cached_property
    def probabilities(self) -> Float[Tensor, "T E"]:
        return probabilities(self.function, self.logits, self.scores)

    def with_sums(self, sums: Mapping[str, Tensor]) -> Routed:
        """Return the same with other sums in its assignment."""
        assignment = dataclasses.replace(self.assignment, sums=sums)
        return FusedRouted(self.logits, self.function, assignment, self.found, self.call)

    def totals(self, mask: Tensor | None, group_size: int | None) -> FusedRoute | None:
        """Return the sums, if they were taken over these tokens and groups."""
        same = mask is self.call.mask and group_size == self.call.stats_size
        return self.found if same else None


# A standard deviation per logit, one for all, or none where there is no noise on the logits.
Spread = Float[Tensor, "T E"] | float | None


class Noise(nn.Module):
    """What perturbs a router in training; the base class perturbs nothing. In evaluation it is not asked."""

    def on_input(self, x: Float[Tensor, "T D"], call: RoutingCall) -> Float[Tensor, "T D"]:
        """Return the tokens as the router sees them; the experts' input is not touched."""
        return x

    def on_logits(
        self, x: Float[Tensor, "T D"], logits: Float[Tensor, "T E"], call: RoutingCall
    ) -> tuple[Float[Tensor, "T E"], Spread]:
        """Return the logits that scores and choices are taken from, and their noise's standard deviation."""
        return logits, None

    def maps(self) -> tuple[Tensor, ...]:
        """Return the weights of further linear maps of the tokens that the noise is made of."""
        return ()

    def on_mapped(
        self,
        x: Float[Tensor, "T D"],
        logits: Float[Tensor, "T E"],
        mapped: Sequence[Tensor],
        call: RoutingCall,
    ) -> tuple[Float[Tensor, "T E"], Spread]:
        """Return what `on_logits` does; `mapped` holds x times each of `maps`."""
        return self.on_logits(x, logits, call)

    def sums(
        self, clean: Float[Tensor, "T E"], spread: Spread, routed: Routed, call: RoutingCall
    ) -> Mapping[str, Tensor]:
        """Return sums over tokens for losses ("importance" [E], "load" [E]), with gradient.

        Args: `clean` the logits before `on_logits`, `spread` what it returned beside the noisy ones.
        """
        return {}


class Router(nn.Module):
    """One linear map per MoE layer, [T, D] -> logits [T, E], computed in `dtype` (in fp64 for fp64 input),
    and with `rule` the whole way to an Assignment.

    Equation: h(x) = W_r x (Switch Transformer, eq 1), + b with `bias` (gpt-oss). The parameter stays in its
    own dtype; `dtype` is what it is computed in (torch.bfloat16 is possible and is what selective precision,
    Switch table 2, warns of). `capacity` is the paper's own, for layers that are given none.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        dtype: torch.dtype = torch.float32,
        *,
        rule: SelectionRule | None = None,
        scores: str | ScoreFunction = "softmax",
        noise: Noise | None = None,
        bias: bool = False,
        capacity: Capacity | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.rule, self.scores, self.noise = rule, score_function(scores), noise
        self.capacity = capacity
        # Whether a backbone's initialisation leaves the weight alone (2017 starts its gates at 0).
        self.keeps_initialisation = False
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the weight from a normal truncated at 2 std; std defaults to width ** -0.5. Biases are 0."""
        std = self.weight.shape[1] ** -0.5 if std is None else std
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return logits [T, E] in `dtype` (float64 input stays float64), without noise."""
        wide = torch.float64 if x.dtype == torch.float64 else self.dtype
        (logits,) = linear_maps(x, (self.weight,), wide)
        return logits if self.bias is None else logits + self.bias.to(wide)

    def _mapped(self, x: Tensor, others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the logits and x times each other weight."""
        wide = torch.float64 if x.dtype == torch.float64 else self.dtype
        if not others or self.bias is not None or type(self).forward is not Router.forward:
            return (self(x), *(linear_maps(x, (other,), wide)[0] for other in others))
        return linear_maps(x, (self.weight, *others), wide)

    def route(self, x: Float[Tensor, "T D"], call: RoutingCall) -> Routed:
        """Return logits, scores and the Assignment of T tokens. Raises: UserError without a rule."""
        if self.rule is None:
            raise UserError(
                "this router has no rule to select by; give it one: Router(..., rule=TokenChoice(2))"
            )
        noise = self.noise if call.training else None
        if noise is None:
            return self._routed(self(x), call)
        clean, *mapped = self._mapped(noise.on_input(x, call), noise.maps())
        logits, spread = noise.on_mapped(x, clean, mapped, call)
        routed = self._routed(logits, call)
        return routed.with_sums({**routed.assignment.sums, **noise.sums(clean, spread, routed, call)})

    def _routed(self, logits: Float[Tensor, "T E"], call: RoutingCall) -> Routed:
        """Return scores and choices of logits: in one pass where rule, scores and machine are such."""
        assert self.rule is not None
        top = top_k_of(self.rule)
        found = fused_route(logits, native_name(self.scores), top, call.mask, call.stats_size)
        if found is not None:
            assignment = Assignment(found.experts, found.weights, logits.shape[-1])
            return FusedRouted(logits, self.scores, assignment, found, call)
        scores = self.scores(logits)
        shares = probabilities(self.scores, logits, scores)
        return Routed(logits, scores, shares, self.rule(logits, scores, call))
