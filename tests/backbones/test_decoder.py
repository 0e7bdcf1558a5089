"""The decoder: causal, equal with and without its cache, and built as its settings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewright.backbones import Decoder, initialise
from gatewright.errors import UserError
from gatewright.parts import MLP, MoELayer

VOCAB, WIDTH, LENGTH = 50, 16, 12


def decoder(**changes: Any) -> Decoder:
    """Return a small fp64 decoder of a dense and two mixture layers, one with a shared expert."""
    torch.manual_seed(0)
    layers = [
        MLP(WIDTH, 24),
        MoELayer(WIDTH, 6, 2, 8),
        MoELayer(WIDTH, 4, 3, 8, weights="raw", num_shared_experts=1),
    ]
    arguments = {"num_kv_heads": 2, "head_dim": 4, "context": 20, "qk_norm": "head"} | changes
    return Decoder(VOCAB, WIDTH, 4, layers, **arguments).double()


def texts(length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (3, length), generator=torch.Generator().manual_seed(5))


def test_no_logit_sees_a_later_token():
    model, tokens = decoder(), texts()
    before = model(tokens).logits
    for place in (1, 6, LENGTH - 1):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        after = model(changed).logits
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-12, atol=1e-13)
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-3)
        # What lies behind does see it.
        assert place == LENGTH - 1 or not torch.allclose(after[:, -1], before[:, -1], atol=1e-6)


@pytest.mark.parametrize("pieces", [(LENGTH,), (1,) * LENGTH, (5, 1, 6)])
def test_the_cache_gives_the_same_logits(pieces: tuple[int, ...]):
    model, tokens = decoder(), texts()
    whole = model(tokens).logits
    cache, out = model.new_cache(3), []
    with torch.no_grad():
        for piece in pieces:
            new = tokens[:, cache.length : cache.length + piece]
            out.append(model(new, cache).logits)
    torch.testing.assert_close(torch.cat(out, dim=1), whole, rtol=1e-11, atol=1e-13)
    assert cache.length == LENGTH


def test_texts_of_a_batch_do_not_meet():
    model, tokens = decoder(), texts()
    alone = torch.cat([model(row.unsqueeze(0)).logits for row in tokens])
    torch.testing.assert_close(model(tokens).logits, alone, rtol=1e-12, atol=1e-13)


def test_stats_are_named_by_layer():
    stats = decoder()(texts(), capture=True).stats
    assert set(stats) == {"layers.1.router", "layers.2.router"}
    assert stats["layers.1.router"].num_experts == 6
    assert stats["layers.2.router"].counts.sum() == 3 * LENGTH * 3
    experts = stats["layers.2.router"].experts
    assert experts is not None
    assert experts.shape == (3 * LENGTH, 3)


def test_tied_embeddings_are_one_parameter():
    tied, untied = decoder(tie_embeddings=True), decoder()
    assert tied.head.weight is tied.embedding.weight
    count = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert count == VOCAB * WIDTH
    tied(texts()).logits.square().sum().backward()
    # A token that never came in still gets a gradient, by the output side.
    missing = next(i for i in range(VOCAB) if i not in texts().flatten().tolist())
    assert tied.embedding.weight.grad is not None
    assert tied.embedding.weight.grad[missing].abs().sum() > 0


def test_a_text_beyond_the_context_is_refused():
    model = decoder()
    with pytest.raises(UserError, match="21 positions in a model of context 20"):
        model(texts(21))
    cache = model.new_cache(3)
    with torch.no_grad():
        model(texts(20), cache)
        with pytest.raises(UserError, match="21 positions"):
            model(texts(1), cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16, 4), "vocab_size 0"),
        ((50, 18, 4), "width 18 with num_heads 4"),
        ((50, 16, 0), "num_heads 0"),
    ],
)
def test_shapes_that_cannot_be_are_refused(arguments: tuple[int, ...], message: str):
    with pytest.raises(UserError, match=message):
        Decoder(*arguments, [MLP(16, 16)])
    with pytest.raises(UserError, match="0 layers"):
        Decoder(50, 16, 4, [])


def test_fan_in_draws_with_the_scale_of_switch():
    torch.manual_seed(0)
    model = Decoder(400, 64, 2, [MLP(64, 256), MoELayer(64, 8, 2, 256)])
    initialise.fan_in(model, scale=0.1, embedding_std=0.5)
    # A normal cut at 2 std keeps 0.880 of its std.
    for weight, fan_in in (
        (model.layers[0].feed_forward.w_down, 256),
        (model.layers[1].feed_forward.experts.w_gate_up, 64),
        (model.layers[1].feed_forward.experts.w_down, 256),
        (model.head.weight, 64),
    ):
        std = (0.1 / fan_in) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(0.88 * std, rel=0.03)
        assert float(weight.detach().abs().max()) <= 2 * std
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.88 * 0.5, rel=0.03)
    assert all(bool((m.weight == 1).all()) for m in model.modules() if type(m).__name__ == "RMSNorm")


def test_normal_is_cut_at_three():
    torch.manual_seed(0)
    model = initialise.normal(Decoder(400, 64, 2, [MLP(64, 256)]), std=0.02, cut=3.0)
    for weight in (m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)):
        assert float(weight.detach().std()) == pytest.approx(0.02 * 0.987, rel=0.03)
        assert float(weight.detach().abs().max()) <= 0.06
