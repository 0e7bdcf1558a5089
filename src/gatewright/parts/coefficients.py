"""What a paper's or library's coefficient is in our convention: one weight per loss, mean over layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from gatewright.errors import UserError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Coefficient:
    """`weight` times our loss `loss` (a name of LOSSES) has the effect of theirs; `why` is the arithmetic."""

    loss: str
    weight: float
    why: str


@dataclass(frozen=True)
class Convention:
    """How somebody else's loss differs from ours: theirs = factor(E, K) * ours, summed over L layers or not.

    `coefficient`: the published one, None where there is none to publish. `factor` is None for 1, else
    `needs` says which of E ("num_experts") and K ("num_selected") it looks at.
    """

    why: str
    coefficient: float | None = None
    summed: bool = False
    factor: Callable[[int, int], float] | None = None
    needs: str = ""


def _one_over_square(num_experts: int, _: int) -> float:
    return 1 / num_experts**2


def _selected(_: int, num_selected: int) -> float:
    return float(num_selected)


def _unbiased_half(num_experts: int, _: int) -> float:
    return num_experts / (num_experts - 1) / 2 if num_experts > 1 else 0.0


_TO_K = "f sums to K, so balanced is K"
_UNBIASED = "half the sum of importance and load loss, with the unbiased variance E / (E - 1)"
_PER_LAYER = "added per MoE layer"
_DEEPSEEK = "the equation is one layer's, and the released code adds every layer's"
_CALLER = "each layer keeps its own, and callers add them"

CONVENTIONS: dict[str, dict[str, Convention]] = {
    # papers
    "sparsely_gated": {
        "importance": Convention(f"CV^2 as here, {_PER_LAYER} (its language model has one)", 0.1, True),
        "load": Convention(f"CV^2 as here, {_PER_LAYER} (its language model has one)", 0.1, True),
    },
    "gshard": {
        "gshard": Convention(
            f"printed without E^2, {_PER_LAYER}; the paper gives no value",
            None,
            True,
            _one_over_square,
            "num_experts",
        )
    },
    "switch": {"balance": Convention(_PER_LAYER, 0.01, True)},
    "glam": {"gshard": Convention(f"GShard's loss with E^2, {_PER_LAYER}", 0.01, True)},
    "vmoe": {
        "importance": Convention(f"half of lambda 0.01, {_PER_LAYER}", 0.005, True),
        "load": Convention(f"half of lambda 0.01, {_PER_LAYER}", 0.005, True),
    },
    "st_moe": {
        "gshard": Convention(f"first choices only, as Switch: {_PER_LAYER}", 0.01, True),
        "z": Convention(_PER_LAYER, 0.001, True),
    },
    "expert_choice": {"balance": Convention("balanced by construction: no balance loss", 0.0)},
    "mixtral": {
        "balance": Convention(
            f"from the public configuration, not the paper; transformers' convention, {_TO_K}",
            0.02,
            False,
            _selected,
            "num_selected",
        )
    },
    "qwen3": {
        "balance": Convention(
            f"over the global batch; the released configuration's, in transformers' convention, {_TO_K}",
            0.001,
            False,
            _selected,
            "num_selected",
        )
    },
    "nllb": {
        "balance": Convention(
            f"transformers' default configuration and convention, {_TO_K}; encoder's and decoder's are added",
            0.001,
            False,
            _selected,
            "num_selected",
        )
    },
    "deepseek_moe": {"balance": Convention(f"the 2B model's; {_DEEPSEEK}", 0.01, True)},
    "deepseek_moe_16b": {"balance": Convention(_DEEPSEEK, 0.001, True)},
    "deepseek_v2": {
        "balance": Convention(_DEEPSEEK, 0.003, True),
        "device": Convention(_DEEPSEEK, 0.05, True),
        "communication": Convention(_DEEPSEEK, 0.02, True),
    },
    "deepseek_v3": {"sequence_balance": Convention(_DEEPSEEK, 1e-4, True)},
    "olmoe": {
        "balance": Convention("MegaBlocks' convention is ours (in transformers 0.01 is K times it)", 0.01),
        "z": Convention("mean over layers, as OLMo-core has it", 0.001),
    },
    "remoe": {"relu": Convention("lambda is in the router's sum already; mean over layers", 1.0)},
    # libraries: the coefficient is the user's own
    "transformers": {
        "balance": Convention(
            f"{_TO_K}; exact for one layer, as layers are pooled before the product",
            None,
            False,
            _selected,
            "num_selected",
        )
    },
    "megatron": {
        "balance": Convention(f"aux_loss and global_aux_loss, {_PER_LAYER}", None, True),
        "sequence_balance": Convention(f"seq_aux_loss, {_PER_LAYER}", None, True),
        "z": Convention(_PER_LAYER, None, True),
    },
    "nemo": {
        "balance": Convention(
            f"Megatron's aux_loss, and Automodel's with softmax before top-k: {_PER_LAYER}", None, True
        ),
        "z": Convention(f"Megatron's; {_PER_LAYER}", None, True),
    },
    "torchtitan": {
        "balance": Convention(
            f"the loss per micro-batch, {_PER_LAYER}; load_balance_coeff is no loss but the bias's step u",
            None,
            True,
        )
    },
    "megablocks": {"balance": Convention("the same, mean over layers")},
    "flaxformer": {
        "balance": Convention(
            f"{_TO_K}; t5x takes the mean over layers", None, False, _selected, "num_selected"
        ),
        "z": Convention("t5x takes the mean over layers"),
    },
    "mesh_tensorflow": {"gshard": Convention(f"first choices, with E^2, {_PER_LAYER}", None, True)},
    "lingvo": {"gshard": Convention(f"first choices, with E^2, {_PER_LAYER}", None, True)},
    "fairscale": {
        "gshard": Convention(
            f"first choices, without E^2; {_CALLER}", None, True, _one_over_square, "num_experts"
        )
    },
    "fairseq": {"gshard": Convention("first choices, with E^2; averages layers unless told to sum")},
    "fastmoe": {
        "gshard": Convention(f"first choices, with E^2; {_CALLER}", None, True),
        "balance": Convention(f"the Switch gate's, as here while nothing is dropped; {_CALLER}", None, True),
    },
    "deepspeed": {"gshard": Convention(f"first choices, with E^2 (top-1 and top-2); {_CALLER}", None, True)},
    "tutel": {
        "gshard": Convention(f"first choices, with E^2; {_CALLER}", None, True),
        "importance": Convention(f"{_UNBIASED}; {_CALLER}", None, True, _unbiased_half, "num_experts"),
        "load": Convention(f"{_UNBIASED}; {_CALLER}", None, True, _unbiased_half, "num_experts"),
    },
}


def coefficient_for(
    name: str,
    loss: str | None = None,
    *,
    coefficient: float | None = None,
    num_experts: int | None = None,
    num_selected: int | None = None,
    num_layers: int | None = None,
) -> Coefficient:
    """Return our weight that has the effect of a paper's or library's coefficient: theirs = weight * ours.

    Args: `name` of CONVENTIONS; `loss` one of its losses, else its first; `coefficient` theirs,
    where none is published or another is meant. E, K and the number of MoE layers are asked for where they
    are part of the factor.
    Raises: UserError for an unknown name or loss, and for a number that is missing or impossible.
    """
    losses = _named(CONVENTIONS, name, "coefficients")
    loss = next(iter(losses)) if loss is None else loss
    convention = _named(losses, loss, f"loss of {name}")
    theirs = convention.coefficient if coefficient is None else coefficient
    if theirs is None:
        raise UserError(
            f"{name} publishes no coefficient of its {loss} loss; give yours: coefficient_for({name!r}, "
            f"{loss!r}, coefficient=0.01)"
        )
    if not (theirs >= 0 and math.isfinite(theirs)):
        raise UserError(f"coefficient {theirs}; allowed: a finite number of 0 or more")
    given = {"num_experts": num_experts, "num_selected": num_selected, "num_layers": num_layers}
    needed = [convention.needs] if convention.needs else []
    needed += ["num_layers"] if convention.summed else []
    for key, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{key} {value}; allowed: 1 or more")
        if value is None and key in needed:
            raise UserError(
                f"coefficient_for({name!r}, {loss!r}) without {key}; allowed: 1 or more; it is part of the "
                f"factor ({convention.why})"
            )
    steps, weight = [f"{theirs:g}"], float(theirs)
    if convention.factor is not None:
        factor = convention.factor(num_experts or 1, num_selected or 1)
        weight, steps = (
            weight * factor,
            [*steps, f"{factor:g} ({convention.needs} {given[convention.needs]})"],
        )
    if convention.summed and num_layers is not None:
        weight *= num_layers
        steps.append(f"{num_layers} layers")
    return Coefficient(loss, weight, f"{name}: {convention.why}; {' * '.join(steps)} = {weight:g}")


def coefficients_for(
    name: str,
    *,
    num_experts: int | None = None,
    num_selected: int | None = None,
    num_layers: int | None = None,
) -> tuple[Coefficient, ...]:
    """Return `coefficient_for` of every loss that a paper is trained with."""
    return tuple(
        coefficient_for(name, loss, num_experts=num_experts, num_selected=num_selected, num_layers=num_layers)
        for loss in _named(CONVENTIONS, name, "coefficients")
    )


def _named(table: Mapping[str, T], name: str, what: str) -> T:
    if name not in table:
        raise UserError(f"{what} {name!r} unknown{did_you_mean(name, table)}; allowed: {', '.join(table)}")
    return table[name]
