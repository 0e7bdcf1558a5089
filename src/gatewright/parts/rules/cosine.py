"""X-MoE: cosines between a token in few dimensions and the experts, over a learned temperature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError, did_you_mean
from gatewright.parts.router import Noise, Routed, Router
from gatewright.parts.routing import RoutingCall, WeightForm, check_selection
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.token_choice import TokenChoice

# The fixed temperature of the paper's loss, by gate; the learned one starts there.
FIXED_TEMPERATURE: dict[str, float] = {"softmax": 0.3, "sigmoid": 0.07}
LEAST_TEMPERATURE = 0.01
# Shorter vectors have no direction: their cosine is 0, without gradient.
_SHORTEST = 1e-12


class CosineRouter(Router):
    """A router that measures angles: logits s / tau with s_e = (W h) . e_e / (|W h| |e_e|), [T, D] -> [T, E].

    Equation: X-MoE (Chi et al. 2022) eq 6 and 7. `projection` W [d_e, D], `weight` e [E, d_e], `temperature`
    tau [1], learned and held at 0.01 or more (below, it gets no gradient). The gate is softmax(s / tau) or
    sigmoid(s / tau). The length of h and of the expert vectors changes nothing; a zero vector has cosine 0.
    The loss of eq 8 takes softmax(s / tau0) with a fixed tau0, 0.3 or 0.07 by gate: its sum over tokens is
    sums["cosine_importance"] [E], made of the logits after noise.
    Args: `routing_width` d_e, None is E / 2 as in the paper (1 at least).
    Raises: UserError for an unknown gate, a width below 1, and a K that a weight form cannot have.
    Differs: the authors' library does not normalise the token side and has no tau in the gate.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_selected: int = 1,
        dtype: torch.dtype = torch.float32,
        *,
        gate: str = "softmax",
        weights: WeightForm = "raw",
        routing_width: int | None = None,
        noise: Noise | None = None,
    ) -> None:
        if gate not in FIXED_TEMPERATURE:
            raise UserError(
                f"gate {gate!r} is unknown{did_you_mean(gate, FIXED_TEMPERATURE)}; allowed: "
                f"{', '.join(FIXED_TEMPERATURE)}"
            )
        if routing_width is not None and routing_width < 1:
            raise UserError(f"routing_width {routing_width}; allowed: 1 or more; the paper's is E / 2")
        check_selection(num_experts, num_selected, weights)
        inner = max(num_experts // 2, 1) if routing_width is None else routing_width
        rule = TokenChoice(num_selected, weights)
        super().__init__(inner, num_experts, dtype, rule=rule, scores=gate, noise=noise)
        self.fixed_temperature = FIXED_TEMPERATURE[gate]
        self.projection = nn.Parameter(torch.empty(inner, width))
        # One element, not 0-d: sharded training takes no 0-d parameters.
        self.temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw both maps from a normal truncated at 2 std, which defaults to (columns) ** -0.5, and set the
        temperature to the fixed one of the loss.
        """
        super().reset_parameters(std)
        if hasattr(self, "projection"):  # the base class calls this before there is one
            std = self.projection.shape[1] ** -0.5 if std is None else std
            nn.init.trunc_normal_(self.projection, std=std, a=-2 * std, b=2 * std)
            nn.init.constant_(self.temperature, self.fixed_temperature)

    def cosines(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return the cosine of every token with every expert, [T, D] -> [T, E], in `dtype` (fp64 stays)."""
        wide = torch.float64 if x.dtype == torch.float64 else self.dtype
        with torch.autocast(x.device.type, enabled=False):
            tokens = _directions(F.linear(x.to(wide), self.projection.to(wide)))
            return F.linear(tokens, _directions(self.weight.to(wide)))

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return logits s / tau, [T, E], without noise."""
        cosines = self.cosines(x)
        return cosines / self._divisor(cosines.dtype)

    def route(self, x: Float[Tensor, "T D"], call: RoutingCall) -> Routed:
        """Return logits, scores and the Assignment of T tokens, "cosine_importance" among its sums."""
        routed = super().route(x, call)
        wide = torch.promote_types(routed.logits.dtype, torch.float32)
        factor = self._divisor(wide) / self.fixed_temperature
        shares = torch.softmax(routed.logits.to(wide) * factor, dim=-1)
        if call.mask is not None:
            shares = torch.where(call.mask.unsqueeze(-1), shares, 0)
        sums = {**routed.assignment.sums, "cosine_importance": shares.sum(dim=0)}
        return routed.with_sums(sums)

    def _divisor(self, dtype: torch.dtype) -> Tensor:
        """Return tau [1] as it is computed with."""
        return self.temperature.to(dtype).clamp(min=LEAST_TEMPERATURE)


def _directions(vectors: Tensor) -> Tensor:
    """Return each row over its length; rows without one are 0, and so is their gradient."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    real = lengths > _SHORTEST
    return torch.where(real, vectors / torch.where(real, lengths, 1), 0)


register(
    RouterInfo(
        name="cosine",
        scores="softmax or sigmoid of cosine / tau",
        selection="each token its K best experts (K = 1)",
        weights="raw scores",
        capacity="none",
        losses=("cosine",),
        causal=True,
        used_by="X-MoE",
        source="X-MoE eq 6-8",
        make=CosineRouter,
    )
)
