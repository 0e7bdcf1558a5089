"""The two calls that put this toolkit's experts into a transformers model, and what they cannot reach."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from gatewright.conversion.experts import experts_forward, own_or_ours
from gatewright.conversion.layouts import copies_weights, their_weights
from gatewright.errors import UserError
from gatewright.kernels import BACKENDS, choose_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gatewright"
# Families of transformers 5.23 whose experts take no implementation, and what they do instead.
NOT_COVERED = {
    "dbrx": "the three matrices of an expert are rows of 2-D weights, and the class calls them one by one",
    "doge": "each expert is one row of an embedding, retrieved by products of keys",
    "jetmoe": "experts of attention and of the MLP share a sorted layout of their own",
    "llama4": "the weight multiplies the input, outside: every expert gets every token, without an index",
    "longcat_flash": "identity experts stand among the others, in a loop of the class's own",
    "nllb_moe": "experts are a dictionary of modules, called through a mask with capacity",
    "step3p7": "stacked as usual, but the class does not ask transformers for an implementation",
    "switch_transformers": "experts are a dictionary of modules, called through a mask with capacity",
    "vitpose_backbone": "the data set that an image is from names the expert; no token chooses",
}


class Placed(NamedTuple):
    """One module of experts that this toolkit computes: its name in the model, its class, the activation of
    ours that stands for theirs (None: they compute their own between grouped matmuls), and whether the first
    matrix is copied in each call.
    """

    name: str
    experts: str
    activation: str | None
    copies: bool


def register_experts() -> tuple[str, ...]:
    """Register this toolkit with transformers and return the names for `model.set_experts_implementation`:
    "gatewright", where the toolkit chooses the backend, and "gatewright_NAME" for each backend. Calling it
    again changes nothing.

    Raises: UserError where transformers 5 is not installed.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise UserError(
            "transformers 5 is not installed; allowed: transformers>=5.23,<6; pip install 'gatewright[hf]'"
        ) from error
    names = {NAME: None, **{f"{NAME}_{backend}": backend for backend in BACKENDS}}
    for name, backend in names.items():
        if name not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(name, partial(experts_forward, backend=backend))
    return tuple(names)


def use_in_transformers(model: PreTrainedModel, backend: str | None = None) -> tuple[Placed, ...]:
    """Let this toolkit compute the experts of `model`, and return which, in the model's order.

    Args: `backend` as `choose_backend` takes it.
    Raises: UserError, with the model as it was, where one module of experts cannot be computed so, and where
    there is none.
    """
    if backend is not None:
        choose_backend(backend)
    register_experts()
    found = {name: module for name, module in model.named_modules() if _dispatches(module)}
    if not found:
        raise UserError(
            f"{type(model).__name__} {_why_not(model)}; allowed: models whose experts take an "
            "implementation, see docs/transformers.md"
        )
    placed = tuple(_place(name, module, backend) for name, module in found.items())
    before = model.get_experts_implementation()
    wanted = NAME if backend is None else f"{NAME}_{backend}"
    model.set_experts_implementation(wanted)
    missed = [name for name, module in found.items() if module.config._experts_implementation != wanted]
    if missed:
        model.set_experts_implementation(before)
        raise UserError(
            f"transformers does not switch {', '.join(missed)} of {type(model).__name__}; allowed: models "
            f"that it switches; load it with experts_implementation={wanted!r} after register_experts()"
        )
    return placed


def _dispatches(module: nn.Module) -> bool:
    """Return whether a module of experts asks transformers which implementation to call."""
    return all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "_is_expert_parallel"))


def _place(name: str, module: Any, backend: str | None) -> Placed:
    """Return how one module of experts is computed. Raises: UserError where it cannot be."""
    their_weights(module)
    activation = own_or_ours(module, backend)
    copies = activation is not None and copies_weights(module)
    return Placed(name, type(module).__name__, activation, copies)


def _why_not(model: nn.Module) -> str:
    """Return in words why no module of a model can be computed by this toolkit."""
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    reason = _reason(type(model).__module__.split("."), family)
    return f"cannot run on this toolkit's experts ({reason})" if reason else "has no experts to compute"


def _reason(parts: Iterable[str], family: str) -> str:
    """Return what NOT_COVERED says of a model's family, by its folder or its type."""
    return next((NOT_COVERED[part] for part in (*parts, family) if part in NOT_COVERED), "")
