"""Released models beside the lineage: their page says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatewright.backbones import count_cost, on_no_memory
from gatewright.papers import get_paper
from gatewright.papers.registry import MODELS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", MODELS)
def test_the_page_has_every_size_and_deviation(model: str):
    file = get_paper(model)
    for name, settings in file.PUBLISHED.items():
        with on_no_memory():
            cost = count_cost(file.build(settings), context=1)
        row = f"| `{model}` | `{name}` | {cost.total_parameters:,} | {cost.active_parameters:,} |"
        assert row in PAGE
    told = " ".join(PAGE.split(f"`{model}`:\n")[1].split("`:\n")[0].split())
    assert [sentence for sentence in file.DEVIATIONS if sentence not in told] == []


def test_windows_sinks_and_positions_are_where_the_models_have_them():
    gpt, llama = (get_paper(name) for name in ("gpt_oss", "llama4"))
    built = gpt.build(gpt.Settings(num_layers=4))
    assert [b.attention.window for b in built.layers] == [64, None, 64, None]
    assert all(b.attention.sinks is not None for b in built.layers)
    built = llama.build(llama.Settings(num_layers=8))
    assert [b.attention.rotary for b in built.layers] == [True, True, True, False] * 2
    assert [b.attention.window for b in built.layers] == [128, 128, 128, None] * 2
