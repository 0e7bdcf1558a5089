"""A model whose experts are read in int8."""

from __future__ import annotations

from torch import nn

from gatewright.errors import UserError
from gatewright.parts.experts import Experts
from gatewright.parts.int8_experts import Int8Experts
from gatewright.parts.layer import MoELayer


def quantise_experts(model: nn.Module) -> int:
    """Return in how many layers the experts of `model` are now `Int8Experts`, in place; nothing else of it
    changes, and its experts can no longer be trained or saved.

    Raises: UserError for a model none of whose layers has experts of this toolkit's own kind; ValueError for
    weights that are not finite.
    """
    layers = [one for one in model.modules() if isinstance(one, MoELayer) and type(one.experts) is Experts]
    if not layers:
        raise UserError(
            "a model without an MoELayer of stacked Experts; allowed: one with such a layer that is not "
            "quantised yet"
        )
    for layer in layers:
        assert isinstance(layer.experts, Experts)
        layer.experts = Int8Experts(layer.experts)
    return len(layers)
