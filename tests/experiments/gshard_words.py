"""Words of counting in four languages as verses, catalogs and a book, and a plan for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatewright.experiments.gshard_runs import BILINGUAL, MANY, PLAN, SPARSE, TWIN
from gatewright.experiments.gshard_text import Sources, TextPlan, full

WORDS = {
    "en": "one two three four five six seven eight nine ten".split(),
    "es": "uno dos tres cuatro cinco seis siete ocho nueve diez".split(),
    "fr": "un deux trois quatre cinq sixte sept huit neuf dix".split(),
    "sv": "ett två tre fyra fem sex sju åtta nio tio".split(),
}
VERSES = {name: [f"{a} {b} {c}" for a in own for b in own for c in own[:3]] for name, own in WORDS.items()}
# Single words and pairs, of which some are verses too; no Swedish catalog, and Spanish has but a half.
CATALOGS = {
    name: [f"{a} {b}" for a in own for b in own] + [f"{own[0]} {own[0]} {a}" for a in own]
    for name, own in WORDS.items()
    if name != "sv"
}
CATALOGS["es"] = [line if i % 2 else "" for i, line in enumerate(CATALOGS["es"])]
BOOK = {name: [f"{own[9]} {own[8]} {a} {b}" for a in own for b in own[:2]] for name, own in WORDS.items()}
LANGUAGES = ("en", "es", "fr", "sv")
TEXT = TextPlan(
    languages=("es", "fr", "sv"), many=("es", "fr"), unseen=(("es", "fr"), ("fr", "es")), low="es",
    low_share=0.2, source_pieces=300, target_pieces=280, many_pieces=300, longest=30, held_out=0.1,
)  # fmt: skip
FEWER = [own for own in PLAN.systems if own.name in (SPARSE, TWIN, BILINGUAL, MANY)]
SMALL = tuple(replace(own, num_experts=min(own.num_experts, 4), learning_rate=None) for own in FEWER)
TINY = replace(
    PLAN, text=TEXT, seeds=(0,), rows=6, steps=6, warmup_steps=2, dev_lines=2, test_lines=2, beams=1,
    levels=(5.0,), systems=SMALL,
    model=replace(PLAN.model, width=16, num_heads=2, head_dim=4, expert_width=8, ffn_width=16),
)  # fmt: skip


def sources() -> Sources:
    lines = {"verses": VERSES, "catalogs": CATALOGS, "handbook": BOOK}
    return Sources({name: full(own, LANGUAGES) for name, own in lines.items()}, {})


def no_search(model: Any, batches: Any, tokenizer: Any, ends: Any, search: Any) -> list[str]:
    """Stand in for the search, which takes long and has a test of its own: how long each source is."""
    return [f"one two {int(length)}" for batch in batches for length in batch.source_mask.sum(1)]
