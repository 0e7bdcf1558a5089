"""Dense twins: the same backbone with every mixture replaced by a dense layer of equal compute, or of
equal size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from gatewright.backbones import Cost, count_cost, moe_pattern, on_no_memory, per_layer
from gatewright.errors import UserError
from gatewright.papers.registry import get_text_paper
from gatewright.training.run import require_finite

Against = Literal["active", "total"]

# How far a twin may be from what it is to equal, as a share.
TOLERANCE = 0.01


def selected_per_token(settings: Any) -> Any:
    """Return K as the settings have it; papers without that setting (Switch) select one expert."""
    return getattr(settings, "num_selected", 1)


def cost_of(paper: str, settings: Any) -> Cost:
    """Return the cost per token of a model from its settings, on no memory."""
    with on_no_memory():
        return count_cost(get_text_paper(paper).build(settings), settings.context)


def dense_twin(paper: str, settings: Any, against: Against = "active") -> Any:
    """Return Settings of the dense twin.

    "active": equal forward FLOPs per token within 1 %; the routers' FLOPs are counted, so the twin's layers
    are a little wider than the experts that a token meets. "total": as many total parameters within 1 %.
    Dense layers of the original keep their width.
    Raises: UserError if the settings are dense already, or too small for 1 %.
    """
    require_finite(settings)
    n = settings.num_layers
    target = _measure(cost_of(paper, settings), against)
    pattern = moe_pattern(settings.moe_layers, n)
    if not any(pattern):
        raise UserError(
            "the model has no sparse layer; allowed: a sparse model; a race needs two different sides"
        )
    selected = per_layer("num_selected", selected_per_token(settings), n)
    experts = per_layer("num_experts", settings.num_experts, n)
    expert_width = per_layer("expert_width", settings.expert_width, n)
    kept = per_layer("ffn_width", settings.ffn_width, n)
    many = selected if against == "active" else experts
    base = [many[i] * expert_width[i] if sparse else kept[i] for i, sparse in enumerate(pattern)]

    def widened(extra: int) -> Any:
        """`extra` units of width, one after the other over the layers that were sparse."""
        places = [i for i, sparse in enumerate(pattern) if sparse]
        widths = list(base)
        for number, i in enumerate(places):
            widths[i] += extra // len(places) + (number < extra % len(places))
        return dataclasses.replace(settings, moe_layers="none", ffn_width=tuple(widths))

    one, two = (_measure(cost_of(paper, widened(extra)), against) for extra in (0, 1))
    extra = max(0, round((target - one) / (two - one)))
    twin = widened(extra)
    reached = _measure(cost_of(paper, twin), against)
    if extra and abs(reached / target - 1) > TOLERANCE:
        # A further block has the last layer's width, so that a unit there costs more than the first one.
        twin = widened(max(0, round(extra * (target - one) / (reached - one))))
        reached = _measure(cost_of(paper, twin), against)
    if abs(reached / target - 1) > TOLERANCE:
        raise UserError(
            f"the nearest dense twin has {reached / target - 1:+.1%} of the sparse model's {against} cost; "
            "allowed: within 1 %; "
            "choose a larger width or expert_width"
        )
    return twin


def _measure(cost: Cost, against: Against) -> float:
    return cost.forward_flops_per_token if against == "active" else float(cost.total_parameters)
