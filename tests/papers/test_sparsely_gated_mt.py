"""The translation models of 2017: printed operations and parameters, losses, and what its page says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.backbones import RecurrentEncoderDecoder, count_cost, on_no_memory
from gatewright.errors import UserError
from gatewright.objectives import NextToken
from gatewright.papers import get_paper, get_trained_paper
from gatewright.papers.sparsely_gated_mt import PUBLISHED, Settings, build, objective
from gatewright.parts import MoELayer

# Appendix E and table 5: millions of operations per time step of both texts, the softmax over 2^15 pieces
# included; an LSTM is 4 x 2048 x (512 + 512) + 2048 x 512 = 9.44, the context 4 x 2048 x 512 = 4.19 more.
LSTMS, CONTEXT, SOFTMAX = 5 * 9_437_184, 4_194_304, 512 * 2**15
OPERATIONS = {
    "multilingual": (LSTMS + CONTEXT + SOFTMAX + 2 * 2 * (2 * 512 * 8192), 102e6),
    "moe-32": (LSTMS + CONTEXT + SOFTMAX + 2 * 4 * (2 * 512 * 2048), 85e6),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_the_paper(name: str):
    by_hand, printed = OPERATIONS[name]
    assert by_hand == pytest.approx(printed, rel=0.005)
    settings = replace(PUBLISHED[f"sparsely_gated_mt/{name}"], context=1, target_context=1)
    with on_no_memory():
        cost = count_cost(build(settings), 1)
    # One token of either text. The paper's figure leaves out gates and attention; 11 ids are tags and end.
    left_out = ("router", "attention_projections", "attention_scores")
    own = sum(flops for part, flops in cost.flops.items() if part not in left_out) / 2
    assert own == by_hand + 11 * 512
    assert cost.flops["attention_projections"] == 2 * 2 * 512 * 512


def test_parameters_are_those_of_the_paper():
    with on_no_memory():
        cost = count_cost(build(PUBLISHED["sparsely_gated_mt/multilingual"]), 40)
    experts = 2 * 512 * 2 * 512 * 8192
    assert cost.total_parameters == pytest.approx(8.7e9, rel=0.005)
    assert experts < cost.inner_parameters < experts + 60e6
    assert cost.total_parameters - cost.active_parameters == experts * 510 // 512


def test_the_small_default_trains_all_its_parameters():
    torch.manual_seed(0)
    settings = Settings(importance_weight=0.1, load_weight=0.1)
    model: Any = build(settings)
    assert isinstance(model, RecurrentEncoderDecoder)
    assert [m.num_experts for m in model.modules() if isinstance(m, MoELayer)] == [32, 32]
    ids = torch.randint(0, 1024, (8, 20), generator=torch.Generator().manual_seed(1))
    loss = objective(settings)(model(ids, ids, key=torch.tensor(1)), ids)
    loss.total.backward()
    assert 6 < float(loss.task.detach()) < 8  # ln 1035 = 6.94 for a model that knows nothing
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert objective(settings).losses == {"importance": 0.2, "load": 0.2}
    assert objective(replace(settings, gate="balanced")).losses == {"threshold": 0.2}


def test_without_experts_a_dense_layer_stands_in_their_place():
    model: Any = build(Settings(num_experts=0, ffn_width=96))
    assert [block.feed_forward.w_down.shape for block in model.blocks().values()] == [(64, 96)] * 2
    assert model.routers() == {}
    assert objective(Settings(num_experts=0)) == NextToken()
    bare: Any = build(Settings(num_experts=0))
    assert [block.feed_forward for block in bare.blocks().values()] == [None, None]


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match="num_experts -1; allowed: 1 or more, or 0 for a dense layer"):
        build(Settings(num_experts=-1))
    with pytest.raises(UserError, match="gate 'hard' is unknown; allowed: flat"):
        build(Settings(gate="hard"))
    with pytest.raises(UserError, match="'sparsely_gated_mt' does not train on text; allowed"):
        get_trained_paper("sparsely_gated_mt")


def test_the_page_has_its_sizes_and_deviations():
    page = Path(__file__).resolve().parents[2] / "docs" / "papers" / "sparsely_gated.md"
    text, file = " ".join(page.read_text(encoding="utf-8").split()), get_paper("sparsely_gated_mt")
    assert [sentence for sentence in file.DEVIATIONS if sentence not in text] == []
    assert [name for name in file.PUBLISHED if f"`{name}`" not in text] == []
