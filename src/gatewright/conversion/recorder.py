"""What the routers of a transformers model chose, as Stats: recorded by hooks while the model runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatewright.conversion.routers import Choices, RouterSite, choice_names, router_sites
from gatewright.errors import UserError
from gatewright.parts.dispatch import make_plan
from gatewright.parts.record import record_call
from gatewright.parts.router import Routed
from gatewright.parts.routing import Assignment
from gatewright.parts.scores import ScoreFunction, probabilities
from gatewright.parts.stats import RouterStats, Stats


@dataclass
class _Layer:
    """One sparse layer while it is recorded."""

    site: RouterSite
    scores: ScoreFunction
    logits: Tensor | None = None
    calls: list[Choices] = field(default_factory=list)


class RouterRecorder:
    """Records every router of a model; `stats` is what the last forward pass of the model chose, by the name
    of the layer ("model.layers.0.mlp"). A layer that runs twice in one pass is a second router, "NAME:2".

    Only what happens inside the model's own forward pass is recorded: layers that are computed again in the
    backward pass are not counted again. Padding, by `attention_mask` [B, S], enters nothing. The sums carry
    gradients, so that losses can be made of them. Choices stand in falling order of their weights.
    Args: `capture` keeps logits, scores and choices of every token too; without `gradients` nothing of the
    graph is kept.
    Raises: UserError for a model without a router that can be read.
    """

    def __init__(self, model: nn.Module, *, capture: bool = False, gradients: bool = True) -> None:
        self.capture, self.gradients = capture, gradients
        self.stats = Stats()
        self._layers = [_Layer(site, site.scores) for site in router_sites(model)]
        self._active = False
        self._shape: tuple[int, int] | None = None
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        for layer in self._layers:
            self._hook(layer)
        self._handles += [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def sites(self) -> tuple[RouterSite, ...]:
        """The layers that are recorded."""
        return tuple(layer.site for layer in self._layers)

    def close(self) -> None:
        """Take every hook off the model; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> RouterRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hook(self, layer: _Layer) -> None:
        site = layer.site

        def read(module: nn.Module, args: Any, output: Any) -> None:
            if self._active and site.read is not None:
                layer.calls.append(site.read(module, output))

        def hear(module: nn.Module, args: Any, output: Any) -> None:
            if self._active:
                layer.logits = output if isinstance(output, Tensor) else output[0]

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active:
                layer.calls.append(_choices(layer, module, args, kwargs))

        if site.experts is None:
            self._handles.append(site.router.register_forward_hook(read))
        else:
            self._handles += [
                site.source.register_forward_hook(hear),
                site.experts.register_forward_pre_hook(take, with_kwargs=True),
            ]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._active = True
        self._shape, self._mask = _batch(args, kwargs)
        self._clear()

    def _clear(self) -> None:
        for layer in self._layers:
            layer.logits, layer.calls = None, []

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._active = False
        # A pass that raised gives no output, and what it had recorded is not a pass.
        self.stats = Stats() if output is None else self._stats()
        self._clear()

    def _stats(self) -> Stats:
        found = {}
        for layer in self._layers:
            for number, call in enumerate(layer.calls, 1):
                name = layer.site.name if number == 1 else f"{layer.site.name}:{number}"
                mask, sequence = self._rows(name, call.experts.shape[0])
                call = call if self.gradients else call.detached()
                found[name] = _record(call, layer.scores, mask, sequence, self.capture)
        return Stats(found)

    def _rows(self, name: str, num_tokens: int) -> tuple[Tensor | None, int | None]:
        """Return the mask of a layer's rows [T] and the tokens of a sequence, None where they are unknown."""
        if self._shape is not None and num_tokens == self._shape[0] * self._shape[1]:
            sequence = self._shape[1]
            # With a cache the mask covers what came before too: the last columns are this pass's.
            mask = None if self._mask is None else self._mask[:, -sequence:].reshape(-1)
            return mask, sequence
        if self._mask is None or bool(self._mask.all()):
            return None, None
        raise UserError(
            f"{name} routes {num_tokens} rows for a batch of {self._shape}, so its padding is not known; "
            "allowed: an attention_mask without padding, or one row per token"
        )


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[int, int] | None, Tensor | None]:
    """Return (B, S) of a call of a model, and its padding mask [B, S] bool, None where it has none."""
    given = [kwargs.get("input_ids"), *args[:1], kwargs.get("inputs_embeds")]
    ids = next((value for value in given if isinstance(value, Tensor)), None)
    shape = None if ids is None or ids.dim() < 2 else (ids.shape[0], ids.shape[1])
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    # Of four axes it says who may see whom, not what is padding.
    return shape, mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _choices(layer: _Layer, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choices:
    """Return what experts were told, with the logits that their router had just given."""
    names = choice_names(experts)
    assert names is not None
    index, weights = (kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names, 1))
    logits, layer.logits = layer.logits, None
    if logits is None:
        raise UserError(
            f"{type(experts).__name__} of {layer.site.name} ran without its router; allowed: a model whose "
            "layers call both"
        )
    logits = logits.reshape(-1, logits.shape[-1])
    computed = getattr(experts, "num_experts", None)
    if computed is not None and logits.shape[-1] == computed + 1:
        # ZAYA's last class skips the experts; it is handed on as expert 0 with weight 0.
        index = torch.where(weights == 0, computed, index)
    return Choices(logits, index, weights)


def _record(
    call: Choices, scores: ScoreFunction, mask: Tensor | None, sequence: int | None, capture: bool
) -> RouterStats:
    """Return the statistics of one call; `sequence` tokens in each group that Stats tell apart."""
    logits = call.logits.to(torch.promote_types(call.logits.dtype, torch.float32))
    order = torch.sort(call.weights.detach(), dim=1, descending=True, stable=True).indices
    experts, weights = call.experts.long().gather(1, order), call.weights.gather(1, order)
    if mask is not None:
        # Padding may hold NaN: where, not multiply, keeps it out of values and gradients.
        mask = mask.to(logits.device)
        real = mask.unsqueeze(-1)
        logits, weights = torch.where(real, logits, 0), torch.where(real, weights, 0)
        experts = torch.where(real, experts, -1)
    found = scores(logits)
    assignment = Assignment(experts, weights, logits.shape[-1])
    routed = Routed(logits, found, probabilities(scores, logits, found), assignment)
    return record_call(routed, make_plan(assignment), mask, sequence, capture)


class RecordedModel(nn.Module):
    """A transformers model that is called as a model of ours: `model(tokens, capture=True).stats`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.recorder = RouterRecorder(model, capture=True)
        takes = inspect.signature(type(model).forward).parameters
        # The logits of a large vocabulary would be the largest tensor of all, for nothing.
        own = {"use_cache": False, "logits_to_keep": 1}
        self._options = {name: value for name, value in own.items() if name in takes}

    def forward(self, tokens: Tensor, mask: Tensor | None = None, capture: bool = True) -> SimpleNamespace:
        """Return an object with the `stats` of tokens [B, S]; `mask` [B, S] bool is False at padding."""
        given = {} if mask is None else {"attention_mask": mask}
        self.model(input_ids=tokens, **given, **self._options)
        return SimpleNamespace(stats=self.recorder.stats)
