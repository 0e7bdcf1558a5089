"""Where a training step's time goes: parts of the model labelled, one profiler's events summed by label."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from gatewright.backbones import Decoder
from gatewright.backbones.attention import Attention
from gatewright.backbones.latent import LatentAttention
from gatewright.backbones.norm import RMSNorm
from gatewright.backbones.transformer import Block
from gatewright.parts import MLP, MoELayer

MARK = "gatewright.part:"
# The order in which a step meets them; "rest" is Python, autograd's own work and what no label covers.
PARTS = (
    *("data", "embedding", "norms", "projections", "attention", "router", "experts", "shared_experts"),
    *("dense_ffn", "head", "loss", "optimizer", "rest"),
)
# Linear maps are a part of their own inside an attention module, and the head where no module is.
LINEAR = {"aten::linear", "Maps", "gatewright::maps_forward", "gatewright::few_rows_maps"}
MAPPED = {"attention": "projections", "rest": "head"}
Times = dict[str, dict[str, float]]


@contextmanager
def labelled(owner: Any, name: str, part: str) -> Iterator[None]:
    """Run what is called as `owner.name` inside the profiler's range of a part, within this context."""
    was_own = name in vars(owner)
    function = getattr(owner, name)

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + part):
            return function(*args, **kwargs)

    setattr(owner, name, inside)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)


def model_labels(model: Decoder) -> Iterator[tuple[Any, str, str]]:
    """Yield (owner, method, part) for a decoder's modules; the innermost label of a moment counts."""
    yield model.embedding, "forward", "embedding"
    yield model.head, "forward", "head"
    for module in model.modules():
        part = part_of(module)
        if part is not None:
            yield module, "forward", part
        if isinstance(module, MoELayer):
            yield module.experts, "forward", "experts"
            if module.shared is not None:
                yield module.shared, "forward", "shared_experts"


def part_of(module: nn.Module) -> str | None:
    """Return the part that a module's own work belongs to."""
    if isinstance(module, RMSNorm | Block):
        return "norms"
    if isinstance(module, Attention | LatentAttention):
        return "attention"
    if isinstance(module, MoELayer):
        return "router"
    return "dense_ffn" if isinstance(module, MLP) else None


def time_parts(step: Callable[[], object], steps: int, labels: Iterable[tuple[Any, str, str]]) -> Times:
    """Return seconds per step by part, {"forward", "backward"}, of `steps` calls under torch's profiler.

    A backward node belongs to the part whose forward operator made it. The profiler's own cost is in the
    figures: they say where time goes, and whole steps are timed without it.
    """
    with ExitStack() as stack:
        for owner, name, part in labels:
            stack.enter_context(labelled(owner, name, part))
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
            for _ in range(steps):
                with record_function(MARK + "rest"):
                    step()
    return sum_parts(found.events() or (), steps)


def sum_parts(events: Iterable[Any], steps: int) -> Times:
    """Return seconds per step by part from a profiler's events."""
    every = list(events)
    times: Times = {part: {"forward": 0.0, "backward": 0.0} for part in PARTS}
    makers: dict[int, Any] = {}
    for event in every:
        # Of the operators that carry a number, the last to begin is the one that made the node.
        if event.sequence_nr >= 0 and event.scope == 0 and not event.name.startswith("autograd::"):
            held = makers.get(event.sequence_nr)
            if held is None or event.time_range.start > held.time_range.start:
                makers[event.sequence_nr] = event
    for event in every:
        seconds = event.time_range.elapsed_us() / 1e6 / steps
        if event.name.startswith("autograd::engine::evaluate_function"):
            maker = makers.get(event.sequence_nr)
            times["rest" if maker is None else place_of(maker)]["backward"] += seconds
            times[place_of(event)]["forward"] -= seconds
        elif event.name.startswith(MARK) or is_map(event):
            part = place_of(event)
            times[part]["forward"] += seconds
            above = event.cpu_parent and place_of(event.cpu_parent)
            if above:
                times[above]["forward"] -= seconds
    return times


def is_map(event: Any) -> bool:
    """Say whether an event is a linear map that is a part of its own."""
    above = event.cpu_parent
    return event.name in LINEAR and above is not None and place_of(above) in MAPPED


def place_of(event: Any) -> str:
    """Return the part that an event stands in."""
    mapped = False
    while event is not None:
        if event.name.startswith(MARK):
            part: str = event.name.removeprefix(MARK)
            return MAPPED.get(part, part) if mapped else part
        mapped = mapped or event.name in LINEAR
        event = event.cpu_parent
    return "rest"
