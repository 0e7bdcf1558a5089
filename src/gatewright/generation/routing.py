"""Where generated tokens went: the experts and weights of each, in every layer, as it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatewright.backbones import LanguageModel
from gatewright.generation.reader import Reader
from gatewright.parts import Stats

NOTHING = "this model is dense: no token chooses experts, so there is no routing to show"


class Choice(NamedTuple):
    """One router's choice for one token: experts in falling rank, -1 for an empty place, and weights."""

    experts: list[int]
    weights: list[float]


Route = dict[str, Choice]
"""The choices of one token, by the name of the router."""


def routers_of(model: LanguageModel) -> list[str]:
    """Return the names of the routers that a generated token meets; none of a dense model."""
    return [name for name in model.routers() if not name.startswith("future.")]


def last_route(stats: Stats) -> Route:
    """Return what the last token of a pass chose. A router inside an expert has a choice where it alone was
    reached by that token: in a pass of one token, or of all tokens.
    """
    rows = max(
        (record.experts.shape[0] for record in stats.values() if record.experts is not None), default=0
    )
    return {
        name: Choice(record.experts[-1].tolist(), record.combine_weights[-1].double().tolist())
        for name, record in stats.items()
        if record.experts is not None and record.combine_weights is not None and len(record.experts) == rows
    }


def with_routes(
    reader: Reader, prompt: Tensor, drawn: Iterator[list[int | None]]
) -> Iterator[tuple[int, Route]]:
    """Yield each drawn id of one text with the route that it took itself.

    An id is routed when it is read, in the pass that draws the next: so each comes one pass later than it
    is drawn, and the last is read for that alone.
    """
    text = prompt
    for ids in drawn:
        if text.shape[1] > prompt.shape[1]:
            yield int(text[0, -1]), last_route(reader.stats)
        text = torch.cat([text, text.new_tensor([ids])], dim=1)
    if text.shape[1] > prompt.shape[1]:
        if reader.read_text is None or reader.read_text.shape[1] < text.shape[1]:
            reader.read(text)
        yield int(text[0, -1]), last_route(reader.stats)


def route_line(piece: str, route: Route) -> str:
    """Return one token and its experts, layer by layer, as a line: 'word' 3:0.61+7:0.39 | 0:0.80+5:0.20."""
    layers = [
        "+".join(f"{e}:{w:.2f}" for e, w in zip(*choice, strict=True) if e >= 0) or "none"
        for choice in route.values()
    ]
    return f"{piece!r:<16} {' | '.join(layers)}"


def routing_data(
    routed: Sequence[tuple[int, Route]], pieces: Sequence[str], model: LanguageModel
) -> dict[str, Any] | None:
    """Return the routes as plain data, in the form of a trace: {"routers", "tokens": [{"id", "text",
    "experts" [L][K], "weights" [L][K]}]}, layers in the order of the routers; None of a dense model.
    """
    names = routers_of(model)
    if not names:
        return None
    none = Choice([], [])
    return {
        "routers": names,
        "tokens": [
            {
                "id": token,
                "text": piece,
                "experts": [route.get(name, none).experts for name in names],
                "weights": [[round(w, 4) for w in route.get(name, none).weights] for name in names],
            }
            for (token, route), piece in zip(routed, pieces, strict=True)
        ],
    }
