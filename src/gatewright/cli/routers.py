"""`gatewright routers [NAME]`: every named router, or one of them whole."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from .run import Common, Outcome, command

if TYPE_CHECKING:
    from ..parts import RouterInfo


def main(argv: list[str]) -> int:
    """Run the command."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Return the table of rules, or one router's record."""
    from ..parts import all_routers, router_info
    from .parse import settings_from, take_words

    words, rest = take_words(argv, most=1)
    settings_from(rest, prog="gatewright routers", words="[NAME]", toml=common.from_)
    routers = (router_info(words[0]),) if words else all_routers()
    text = "\n".join(_entry(info) for info in routers)
    if not words:
        text += f"\n{len(routers)} routers: MoELayer(width, experts, selected, expert_width, router=NAME)"
    return Outcome({"routers": [_record(info) for info in routers]}, text)


def _record(info: RouterInfo) -> dict[str, Any]:
    """Return one router as plain data."""
    names = ("name", "scores", "selection", "weights", "capacity", "losses", "causal", "used_by", "source")
    more = {"causal_in_eval": info.causal_at_inference, "num_selected": info.fixed_selected}
    return {**{name: getattr(info, name) for name in names}, **more}


def _entry(info: RouterInfo) -> str:
    """Return one router as a short paragraph."""
    causal = {
        (True, True): "causal",
        (False, True): "causal in evaluation only",
        (True, False): "causal in training only",
        (False, False): "not causal",
    }[info.causal, info.causal_at_inference]
    lines = [
        f"scores: {info.scores}; selects: {info.selection}; weights: {info.weights}",
        f"capacity: {info.capacity}; losses: {', '.join(info.losses) or 'none'}; {causal}",
        f"used by: {info.used_by} ({info.source})",
    ]
    wrapped = [textwrap.fill(line, 100, initial_indent=" " * 4, subsequent_indent=" " * 6) for line in lines]
    return "\n".join([info.name, *wrapped, ""])
