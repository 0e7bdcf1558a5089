"""The selection biases that models of transformers hold, and how one of them learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatewright.conversion.routers import RouterSite, router_sites
from gatewright.errors import UserError
from gatewright.parts.selection_bias import SelectionBias

# What families of transformers 5.23 call them: in the router, in a part of it, or in the block around it.
BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


class Bias:
    """One bias of a model, `held` there, and the rule that moves it; both have the same numbers.

    The rule keeps its own in fp32: a bias in bf16 would not feel a step of 0.001. Where the model's numbers
    are not those that were last written (a checkpoint was loaded), they count.
    """

    def __init__(self, held: Tensor, rule: SelectionBias) -> None:
        self.held, self.rule = held, rule
        self._read()

    def _read(self) -> None:
        with torch.no_grad():
            self.rule.bias.copy_(self.held.detach().reshape(-1))
        self._written = self.held.detach().clone()

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Move the bias once against `counts` [E]."""
        self.rule.to(self.held.device)
        if not torch.equal(self.held.detach(), self._written.to(self.held.device)):
            self._read()
        self.rule.update(counts, int(counts.sum()))
        self.held.copy_(self.rule.bias.view_as(self.held))
        self._written = self.held.detach().clone()


def biases_of(model: nn.Module, rate: float, rule: str, **options: Any) -> dict[str, Bias]:
    """Return the selection bias of each sparse layer that has one, by the layer's name; `options` as
    `SelectionBias` takes them.

    Raises: UserError for a model without one, and for biases that an optimizer trains.
    """
    found = {}
    for site in router_sites(model):
        held = _held(site, model.get_submodule(site.name))
        if held is None:
            continue
        if held.requires_grad:
            raise UserError(
                f"the bias of {site.name} takes gradients, so an optimizer moves it too; allowed: biases "
                "that loads alone move; call requires_grad_(False) on it"
            )
        found[site.name] = Bias(held, SelectionBias(held.numel(), rate, rule, **options))
    if not found:
        raise UserError(
            f"{type(model).__name__} has no selection bias ({' or '.join(BIAS_NAMES)}); allowed: families "
            "that select by one; attach_balance trains the routers of the others"
        )
    return found


def _held(site: RouterSite, block: nn.Module) -> Tensor | None:
    """Return the tensor that a layer adds to its scores when it selects; None where it has none."""
    # Where a block keeps it, its router is handed it; a router's own part may keep it as well (Ernie).
    for owner in (*site.router.modules(), block):
        for name in BIAS_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, Tensor):
                return value
    return None
