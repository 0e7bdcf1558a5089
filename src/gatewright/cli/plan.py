"""`gatewright plan NAME`: parameters, FLOPs and memory of a model from its settings, on no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .run import Common, Outcome, command


@dataclass(frozen=True)
class PlanSettings:
    """What to plan for."""

    dtype: str = "bf16"
    """of the weights: fp32, bf16, int8, int4"""
    context: int | None = None
    """sequence length to plan for; none is the model's own"""
    batch: int = 1
    """sequences that are held at once"""
    device_memory: float | None = None
    """memory of one device in GB (1e9 bytes); none shows a few common sizes"""
    optimizer: str = "adamw"
    """whose state training has to hold"""
    recompute: str = "none"
    """none, or blocks: the activations inside them are computed again instead of kept"""


def main(argv: list[str]) -> int:
    """Run the command."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Plan a published size, a paper's small default (either changed by its flags), or a run."""
    from ..evaluation.plan import plan
    from ..papers import get_trained_paper, published, published_names, trained_papers
    from .parse import settings_from, the_word

    sizes, papers = ", ".join(published_names()), ", ".join(trained_papers())
    names = f"a published size ({sizes}), a paper ({papers}), or a run"
    name, rest = the_word(argv, "gatewright plan", "NAME", names)
    base: list[Any] = []
    if name in published_names():
        base = [published(name)[1]]
    elif name in trained_papers():
        base = [get_trained_paper(name).Settings()]
    # The context is planned for, not built in: the plan says where it exceeds the model's own.
    hidden = ["Settings.context"]
    doors: Any = {"words": "NAME", "hidden": hidden, "toml": common.from_, "intro": f"NAME: {names}."}
    asked, *model = settings_from(rest, PlanSettings, *base, prog="gatewright plan", **doors)
    options = dict(vars(asked))
    options["device_memory_gb"] = options.pop("device_memory")
    if model != base:
        name, options["settings"] = f"{name}, changed", model[0]
    found = plan(name, **options)
    return Outcome(found.to_dict(), found.to_text())
