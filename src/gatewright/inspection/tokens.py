"""A validation text with each token coloured by its expert; legible without JavaScript, richer with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .markup import missing, paragraph
from .palette import expert_colours
from .record import lookup, number, rows, table, text
from .words import escape, percent


@dataclass(frozen=True)
class View:
    """One text: its pieces, and per router the experts [T][K] and weights [T][K] of each."""

    domain: str
    pieces: list[str]
    routers: dict[str, tuple[list[list[int]], list[list[float]]]]


def read_views(side: Mapping[str, Any]) -> list[View]:
    """Return the recorded texts, one or many; routers whose lists do not match the pieces are left out."""
    value = lookup(side, "token_view")
    found = [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []
    views: list[View] = []
    for item in found:
        pieces = [str(piece) for piece in rows(item, "pieces")]
        routers = {}
        for name, routed in table(item, "routers").items():
            experts, weights = rows(routed, "experts"), rows(routed, "weights")
            if len(experts) != len(pieces) or not all(isinstance(chosen, list | tuple) for chosen in experts):
                continue
            if len(weights) != len(pieces) or not all(isinstance(given, list | tuple) for given in weights):
                weights = [[0.0] * len(chosen) for chosen in experts]
            routers[name] = (
                [[int(expert) for expert in chosen] for chosen in experts],
                [[round(float(weight or 0.0), 3) for weight in given] for given in weights],
            )
        if pieces and routers:
            views.append(View(text(item, "domain") or f"text {len(views) + 1}", pieces, routers))
    return views


def count_experts(side: Mapping[str, Any], views: list[View]) -> int:
    """Return the number of experts: from the specialisation table, else one more than the largest id seen."""
    tables = [value for value in table(side, "specialisation", "routers").values() if value]
    known = [len(value[0]) for value in tables if isinstance(value, list) and isinstance(value[0], list)]
    seen = [
        expert
        for view in views
        for chosen, _ in view.routers.values()
        for token in chosen
        for expert in token
    ]
    return max([*known, max(seen, default=0) + 1, int(number(side, "settings", "num_experts") or 0)])


def _piece(piece: str) -> tuple[str, str]:
    """Return what a token shows and the line breaks that follow it: a break keeps its sign in the token."""
    body = piece.rstrip("\n")
    breaks = len(piece) - len(body)
    shown = body.replace("\r", "␍").replace("\t", "→   ").replace("\n", "⏎\n") + "⏎" * breaks
    return escape(shown), "\n" * breaks


def _describe(experts: list[int], weights: list[float]) -> str:
    chosen = [f"{e} ({w:.2f})" if e >= 0 else "dropped" for e, w in zip(experts, weights, strict=False)]
    return "experts " + ", ".join(chosen) if chosen else "no expert"


def _spans(view: View, router: str) -> str:
    experts, weights = view.routers[router]
    spans = []
    for index, piece in enumerate(view.pieces):
        first = experts[index][0] if experts[index] else -1
        style = f"t e{first}" if first >= 0 else "t"
        number_shown = str(first) if first >= 0 else "–"
        title = escape(_describe(experts[index], weights[index]))
        data = f'data-i="{index}" data-e="{number_shown}"'
        shown, breaks = _piece(piece)
        spans.append(f'<span class="{style}" {data} title="{title}">{shown}</span>{breaks}')
    return "".join(spans)


def safe_json(value: Any) -> str:
    """Return JSON that cannot close or open an HTML element from inside a script block."""
    packed = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        packed = packed.replace(letter, f"\\u{ord(letter):04x}")
    return packed


def palette_style(num_experts: int) -> str:
    """Return the CSS rules of the experts' colours, shared by every text of the page."""
    return "".join(
        f".e{index}{{background:{colour}}}" for index, colour in enumerate(expert_colours(num_experts))
    )


def _first_share(view: View, router: str) -> str:
    experts = [chosen[0] for chosen in view.routers[router][0] if chosen and chosen[0] >= 0]
    used = len(set(experts))
    if not experts:
        return "No token of this text reached an expert."
    most = max(set(experts), key=experts.count)
    share = percent(experts.count(most) / len(experts), 0)
    return (
        f"{used} experts are some token’s first choice; most often expert {most}, for {share} of the tokens."
    )


def token_section(side: Mapping[str, Any], slug: str) -> str:
    """Return the text of one side. Without JavaScript: its first text and layer, weights on hover."""
    views = read_views(side)
    if not views:
        return missing("A text with tokens coloured by expert")
    first = views[0]
    router = next(iter(first.routers))
    packed = [
        {"domain": view.domain, "pieces": view.pieces, "routers": {
            name: {"e": experts, "w": weights} for name, (experts, weights) in view.routers.items()}}
        for view in views
    ]  # fmt: skip
    identity = escape(f"tokens-{slug}".rstrip("-_"))
    static = paragraph(
        f"Shown: {escape(first.domain)}, router <code>{escape(router)}</code>. "
        f"{escape(_first_share(first, router))}",
        "shown",
    )
    return (
        f'<div class="tokens" id="{identity}" data-experts="{count_experts(side, views)}">'
        f'<div class="controls" hidden></div>{static}'
        f'<div class="legend" hidden></div>'
        f'<div class="text" tabindex="0" role="group" aria-label="Text coloured by expert; arrow keys move '
        f'from token to token">{_spans(first, router)}</div>'
        f'<div class="detail" role="status" aria-live="polite">Point at or tap a token for its experts '
        f'and weights.</div><script type="application/json">{safe_json(packed)}</script></div>'
    )
