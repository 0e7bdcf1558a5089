"""The routers of a transformers model: where they stand, what they said, and by which scores they choose.

Nearly every family hands its experts (hidden states, chosen ids, weights), and has the router beside them as
`gate` or `router`, which gives the logits first. So no family is named here but where it differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.parts.scores import SCORES, ScoreFunction

# What experts call the chosen ids and their weights, the second and third of what they are given.
_CHOICES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
_BESIDE = ("gate", "router")
# Routers that hand out probabilities, and the part of them that gives the logits.
_LOGITS_INSIDE = {"Gemma4TextRouter": "proj", "DiffusionGemmaTextRouter": "proj"}
# Families of transformers 5.23 with experts whose routers cannot be read so.
NOT_RECORDED = {
    "doge": "an expert is a pair of keys, not one of a list that a token chooses from",
    "nllb_moe": "an encoder and a decoder, whose routers hand out masks with capacity",
    "switch_transformers": "an encoder and a decoder, whose routers hand out masks with capacity",
    "vitpose_backbone": "the data set that an image is from names the expert; no token chooses",
}


@dataclass(frozen=True)
class Choices:
    """What one call of one router decided for T tokens: `logits` [T, E], `experts` and `weights` [T, K]."""

    logits: Tensor
    experts: Tensor
    weights: Tensor

    def detached(self) -> Choices:
        """Return the same without the graph."""
        return Choices(self.logits.detach(), self.experts, self.weights.detach())


# Gives the choices of a router whose experts are not told them, from its output.
Reader = Callable[[Any, Any], Choices]


def _llama4(router: Any, output: Any) -> Choices:
    """Llama-4 gives (weights [T, E], 0 where not chosen, and logits): every expert gets every token."""
    scores, logits = output
    experts = torch.topk(logits, router.top_k, dim=1).indices
    return Choices(logits, experts, scores.gather(1, experts))


def _jetmoe(router: Any, output: Any) -> Choices:
    """JetMoe gives rows sorted by expert, and last the logits; its weights are a softmax of the chosen."""
    logits = output[-1]
    chosen, experts = torch.topk(logits, router.top_k, dim=1)
    return Choices(logits, experts, torch.softmax(chosen, dim=1))


READERS: dict[str, Reader] = {"Llama4Router": _llama4, "JetMoeTopKGating": _jetmoe}


@dataclass(frozen=True)
class RouterSite:
    """A sparse layer of a model: its name there, its router, and the experts that are told what it chose, or
    how the router itself is read. `source`: the module whose output is the logits.
    """

    name: str
    router: nn.Module
    source: nn.Module
    experts: nn.Module | None
    read: Reader | None

    @property
    def scores(self) -> ScoreFunction:
        """The function from logits to the scores that this router chooses by."""
        return score_function_of(self.router)


def router_sites(model: nn.Module) -> tuple[RouterSite, ...]:
    """Return the sparse layers of a transformers model, in its own order.

    Raises: UserError where there is none, where the experts of one have no router beside them, and under
    expert parallelism, where ids are those of one rank.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        above = name.rpartition(".")[0]
        if type(module).__name__ in READERS:
            found.append(RouterSite(above, module, module, None, READERS[type(module).__name__]))
        elif choice_names(module) is not None:
            found.append(_site(above, module, modules.get(above, model)))
    if not found:
        raise UserError(
            f"{type(model).__name__} {_why_none(model)}; allowed: transformers models with a sparse layer, "
            "see docs/inspect.md"
        )
    return tuple(found)


def choice_names(experts: nn.Module) -> tuple[str, str] | None:
    """Return what a module calls the chosen ids and weights that it is given; None if it is given none."""
    names = tuple(inspect.signature(type(experts).forward).parameters)[2:4]
    return next((pair for pair in _CHOICES if pair == names), None)


def _site(name: str, experts: nn.Module, block: nn.Module) -> RouterSite:
    if getattr(experts, "_is_expert_parallel", False):
        raise UserError(
            f"the experts of {name} are spread over ranks (expert parallelism); allowed: models whose ranks "
            "hold all experts; load it without an expert-parallel plan"
        )
    router = next((child for child in (getattr(block, word, None) for word in _BESIDE) if child), None)
    if not isinstance(router, nn.Module):
        raise UserError(
            f"the experts of {name} ({type(experts).__name__}) have no router beside them; allowed: a module "
            f"{' or '.join(_BESIDE)} in {type(block).__name__}"
        )
    inside = _LOGITS_INSIDE.get(type(router).__name__)
    source = router if inside is None else getattr(router, inside)
    return RouterSite(name, router, source, experts, None)


def _why_none(model: nn.Module) -> str:
    """Return in words why no router of a model can be read."""
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    reason = NOT_RECORDED.get(family, "")
    return f"has routers that cannot be read ({reason})" if reason else "has no router"


def score_function_of(router: nn.Module) -> ScoreFunction:
    """Return the function from logits to scores that a router's choices and weights come from: its own
    attribute, else a sigmoid where its forward pass takes one, else a softmax.
    """
    for own in ("score_fn", "scoring_function"):
        function = getattr(router, own, None)
        if callable(function):
            return function
    named = getattr(router, "expert_selection_fn", None)
    if named in SCORES:
        return SCORES[str(named)]
    return SCORES["sigmoid" if "sigmoid" in inspect.getsource(type(router).forward) else "softmax"]
