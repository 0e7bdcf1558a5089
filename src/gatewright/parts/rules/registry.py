"""Named routers: what each scores, selects and weighs by, who uses it, and how to build it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gatewright.errors import UserError, did_you_mean
from gatewright.parts.router import Router


@dataclass(frozen=True)
class RouterInfo:
    """One line of the table of rules, and `make(width, num_experts, num_selected, dtype=..., **options)`.

    `scores`, `selection`, `weights`, `capacity`: a phrase each. `losses`: names of the losses that it is
    trained with (`gatewright.parts.LOSSES`). `causal`: no choice of a token, in training, depends on later
    tokens. `causal_in_eval`: the same in evaluation. `used_by`: models and papers. `source`: paper and
    equation. `fixed_selected`: K where the rule allows one only. `needs_token_ids`: looks at the input.
    """

    name: str
    scores: str
    selection: str
    weights: str
    capacity: str
    losses: tuple[str, ...]
    causal: bool
    used_by: str
    source: str
    make: Callable[..., Router]
    causal_in_eval: bool | None = None
    fixed_selected: int | None = None
    needs_token_ids: bool = False

    @property
    def causal_at_inference(self) -> bool:
        """Whether evaluation is causal; the same as training unless said otherwise."""
        return self.causal if self.causal_in_eval is None else self.causal_in_eval


_ROUTERS: dict[str, RouterInfo] = {}


def register(info: RouterInfo) -> RouterInfo:
    """Add a named router to the table and return it. Raises: ValueError for a name that is taken."""
    if info.name in _ROUTERS:
        raise ValueError(f"router {info.name!r} is registered twice")
    _ROUTERS[info.name] = info
    return info


@cache
def _load() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"gatewright.parts.rules.{module.name}")


def all_routers() -> tuple[RouterInfo, ...]:
    """Return every named router, by name."""
    _load()
    return tuple(_ROUTERS[name] for name in sorted(_ROUTERS))


def router_info(name: str) -> RouterInfo:
    """Return one named router. Raises: UserError for an unknown name."""
    _load()
    if name not in _ROUTERS:
        raise UserError(
            f"router {name!r} is unknown{did_you_mean(name, _ROUTERS)}; allowed: "
            f"{', '.join(sorted(_ROUTERS))}"
        )
    return _ROUTERS[name]


def build_router(
    name: str,
    width: int,
    num_experts: int,
    num_selected: int,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Router:
    """Return a fresh router of that name for tokens of `width` D, E experts and K of them per token.

    Args: `options` are the rule's own, as its class names them.
    Raises: UserError for an unknown name or option, and for a K that the rule does not have.
    """
    info = router_info(name)
    if info.fixed_selected is not None and num_selected != info.fixed_selected:
        raise UserError(
            f"router {name!r} with num_selected {num_selected}; allowed: {info.fixed_selected}; "
            "the rule fixes how many experts a token uses"
        )
    try:
        return info.make(width, num_experts, num_selected, dtype=dtype, **options)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise UserError(
            f"option {unknown[1]!r} of router {name!r} is unknown; allowed: the arguments of its rule; "
            f"`gatewright routers {name}` says what it is"
        ) from None
