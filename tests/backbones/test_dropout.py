"""Dropout of a decoder: only in training, by the key, in every place that the settings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gatewright.backbones import Decoder
from gatewright.backbones.transformer import Block
from gatewright.errors import UserError
from gatewright.papers.switch import Settings, build
from gatewright.parts import MLP, Experts
from gatewright.parts.draws import fold
from gatewright.parts.dropout import dropped

SMALL: dict[str, Any] = {"width": 16, "num_heads": 2, "head_dim": 8, "context": 16, "num_experts": 4}
KEY = torch.tensor(5)


def switch(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    made = build(Settings(**SMALL, expert_width=16, ffn_width=16, capacity_factor=None, **changes)).double()
    assert isinstance(made, Decoder)
    return made


TEXT = torch.randint(0, 257, (2, 8), generator=torch.Generator().manual_seed(1))


def test_a_share_is_0_and_the_others_are_larger():
    x = torch.ones(400, 50)
    found = dropped(x, 0.3, KEY)
    assert sorted(found.unique().tolist()) == [0.0, pytest.approx(1 / 0.7)]
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(found, dropped(x, 0.3, KEY))
    assert not torch.equal(found, dropped(x, 0.3, fold(KEY, 1)))


def test_an_mlp_drops_its_hidden_numbers():
    torch.manual_seed(0)
    layer = MLP(6, 10, "relu", bias=True, dropout=0.5).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    hidden = (x @ layer.w_in.T + layer.b_in).relu()
    slow = dropped(hidden, 0.5, KEY) @ layer.w_down.T + layer.b_down
    assert torch.allclose(layer(x, key=KEY), slow)
    assert torch.allclose(layer.eval()(x, key=KEY), hidden @ layer.w_down.T + layer.b_down)
    with pytest.raises(UserError, match=r"dropout 1.0; allowed: 0 or more and below 1"):
        MLP(6, 10, dropout=1.0)


def test_the_settings_reach_every_place():
    model = switch(dropout=0.1, expert_dropout=0.4)
    assert model.dropout == 0.1
    assert [block.dropout for block in model.layers if isinstance(block, Block)] == [0.1, 0.1]
    assert [own.dropout for own in model.modules() if isinstance(own, MLP)] == [0.1]
    assert [own.dropout for own in model.modules() if isinstance(own, Experts)] == [0.4]
    with pytest.raises(UserError, match=r"dropout 1.0; allowed"):
        switch(dropout=1.0)


@pytest.mark.parametrize("changes", [{"dropout": 0.2}, {"expert_dropout": 0.4}], ids=str)
def test_it_is_for_training_and_by_the_key(changes: Any):
    plain, model = switch(), switch(**changes)
    assert torch.equal(model.eval()(TEXT).logits, plain.eval()(TEXT).logits)
    model.train()
    one, again, other = (model(TEXT, key=key).logits for key in (KEY, KEY, fold(KEY, 1)))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    model.recompute = True
    assert torch.equal(one, model(TEXT, key=KEY).logits)


def test_a_block_drops_what_either_half_adds():
    model = switch(dropout=0.25)
    block = model.layers[0]
    assert isinstance(block, Block)
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    cos, sin = model.rotary.tables(0, 4, x.device, x.dtype)
    attended = x + dropped(block.attention(block.attention_norm(x), cos, sin), 0.25, fold(KEY, 0))
    added = block.feed_forward(block.feed_forward_norm(attended), key=KEY)
    slow = attended + dropped(added, 0.25, fold(KEY, 1))
    assert torch.allclose(block(x, cos, sin, key=KEY)[0], slow)


def test_embedding_and_head_drop_too():
    model = switch(dropout=0.25)
    for block in model.layers:
        block.eval()
    hidden: list[torch.Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    model.head.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    model(TEXT, key=KEY)
    for own in hidden:
        assert float((own == 0).double().mean()) == pytest.approx(0.25, abs=0.1)
