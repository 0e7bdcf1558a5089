"""The recurrent language model against one written in loops, with its state kept or not, and its cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewright.backbones import DeepMLP, LSTMDecoder, count_cost, dense_layer
from gatewright.errors import UserError
from gatewright.parts import MLP, MoELayer, build_router
from gatewright.parts.dropout import dropped

VOCAB, WIDTH, LENGTH = 50, 16, 12


def decoder(lstm_width: int = 0, **changes: Any) -> LSTMDecoder:
    """Return a small fp64 model: LSTM, mixture, LSTM, dense layer, LSTM."""
    torch.manual_seed(0)
    mixture = MoELayer(WIDTH, 6, 2, 8, activation="relu", weights="softmax_selected")
    layers = [None, mixture, dense_layer(WIDTH, 24, 2)]
    return LSTMDecoder(VOCAB, WIDTH, layers, lstm_width, context=20, **changes).double()


def texts(length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (3, length), generator=torch.Generator().manual_seed(5))


def lstm(rows: list[Tensor], w: dict[str, Tensor]) -> list[Tensor]:
    """One text through an LSTM, one position at a time; torch's order: input, forget, cell, output."""
    cells = w["weight_hh_l0"].shape[0] // 4
    h = torch.zeros(w["weight_hh_l0"].shape[1], dtype=torch.float64)
    c = torch.zeros(cells, dtype=torch.float64)
    out = []
    for x in rows:
        sums = w["weight_ih_l0"] @ x + w["bias_ih_l0"] + w["weight_hh_l0"] @ h + w["bias_hh_l0"]
        i, f, g, o = sums.split(cells)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        h = w["weight_hr_l0"] @ h if "weight_hr_l0" in w else h
        out.append(h)
    return out


def mix(x: Tensor, w: dict[str, Tensor], num_selected: int) -> Tensor:
    """One token through its experts: a softmax over the K largest logits."""
    logits = w["router.weight"] @ x
    values = logits.tolist()
    best = sorted(range(len(values)), key=lambda e: (-values[e], e))[:num_selected]
    weights = torch.softmax(logits[best], dim=0)
    parts = [w["experts.w_down"][e] @ (w["experts.w_up"][e] @ x).clamp(min=0) for e in best]
    return torch.stack([a * part for a, part in zip(weights, parts, strict=True)]).sum(0)


def below(w: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in w.items() if name.startswith(prefix)}


def slow(w: dict[str, Tensor], tokens: Tensor, num_layers: int, num_selected: int) -> Tensor:
    """Return logits [B, S, V]: x + sigmoid(mixture(x)), then x + LSTM(x), in each layer."""
    rows_of = []
    for text in tokens.tolist():
        rows = [w["embedding.weight"][i] for i in text]
        for i in range(num_layers):
            own = below(w, f"layers.{i}.feed_forward.")
            if "router.weight" in own:
                rows = [x + torch.sigmoid(mix(x, own, num_selected)) for x in rows]
            elif own:
                new = []
                for x in rows:
                    h = (own["w_in"] @ x).clamp(min=0)
                    for middle in own.get("w_middle", ()):
                        h = (middle @ h).clamp(min=0)
                    new.append(x + torch.sigmoid(own["w_down"] @ h))
                rows = new
            steps = lstm(rows, below(w, f"layers.{i}.lstm."))
            rows = [x + y for x, y in zip(rows, steps, strict=True)]
        rows_of.append(torch.stack([w["head.weight"] @ x for x in rows]))
    return torch.stack(rows_of)


@pytest.mark.parametrize("lstm_width", [0, 24])
def test_logits_and_gradients_are_the_slow_ones(lstm_width: int):
    model, tokens = decoder(lstm_width), texts()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    logits = model(tokens).logits
    weights = torch.randn(logits.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = slow(copies, tokens, 3, 2)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-11)
    theirs = torch.autograd.grad((expected * weights).sum(), list(copies.values()))
    for name, ours, own in zip(copies, gradients, theirs, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_no_logit_sees_a_later_token():
    model, tokens = decoder(), texts()
    before = model(tokens).logits
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB
    after = model(changed).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(after[:, 6], before[:, 6], atol=1e-3)
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-9)


@pytest.mark.parametrize("pieces", [(LENGTH,), (1,) * LENGTH, (5, 1, 6)])
@pytest.mark.parametrize("lstm_width", [0, 24])
def test_the_state_gives_the_same_logits(pieces: tuple[int, ...], lstm_width: int):
    model, tokens = decoder(lstm_width), texts()
    whole = model(tokens).logits
    cache, out = model.new_cache(3), []
    with torch.no_grad():
        for piece in pieces:
            new = tokens[:, cache.length : cache.length + piece]
            out.append(model(new, cache).logits)
    torch.testing.assert_close(torch.cat(out, dim=1), whole, rtol=1e-11, atol=1e-13)
    assert cache.length == LENGTH
    only = model(tokens, only_last=True, with_stats=False)
    torch.testing.assert_close(only.logits, whole[:, -1:], rtol=1e-12, atol=1e-13)
    assert len(only.stats) == 0


def test_the_mixture_sees_all_time_steps_at_once():
    model, tokens = decoder(), texts()
    record = model(tokens, capture=True).stats["layers.1.router"]
    assert int(record.tokens) == tokens.numel()
    assert record.experts is not None
    assert record.experts.shape == (tokens.numel(), 2)
    assert [*model.routers()] == ["layers.1.router"]


def test_dropout_is_a_function_of_the_key_and_scales_what_stays():
    ones, key = torch.ones(4, 500, 16), torch.tensor(3)
    first, again, other = (dropped(ones, 0.25, k) for k in (key, key, torch.tensor(4)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # 32,000 numbers: a standard error of 0.0024.
    assert float((first == 0).float().mean()) == pytest.approx(0.25, abs=0.012)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])


def test_dropout_is_for_training_and_falls_on_every_layer():
    model, tokens, key = decoder(dropout=0.5), texts(), torch.tensor(1)
    trained = model(tokens, key=key).logits
    assert torch.equal(trained, model(tokens, key=key).logits)
    assert not torch.allclose(trained, model(tokens, key=torch.tensor(2)).logits)
    model.eval()
    assert torch.equal(model(tokens, key=key).logits, decoder().eval()(tokens).logits)
    # Embedding, three LSTMs, two feed-forward layers: each is dropped from a key of its own.
    seen: list[int] = []
    model.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatewright.backbones.lstm.dropped", lambda x, share, key: seen.append(int(key)) or x)
        model(tokens, key=key)
    assert len(set(seen)) == len(seen) == 6


def test_recomputing_changes_no_bit():
    model, tokens, key = decoder(dropout=0.3), texts(), torch.tensor(7)
    model.layers[1].feed_forward = MoELayer(
        WIDTH, 6, 2, 8, router=build_router("noisy_top_k", WIDTH, 6, 2)
    ).double()
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        output = model(tokens, key=key)
        loss = output.logits.square().mean() + output.stats["layers.1.router"].sums["load"].square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bf16_is_for_all_but_the_lstm():
    torch.manual_seed(0)
    model = LSTMDecoder(VOCAB, WIDTH, [None, MoELayer(WIDTH, 4, 2, 8)], context=20)
    seen: list[torch.dtype] = []
    model.layers[1].lstm.register_forward_hook(lambda module, given, out: seen.append(out[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(texts()).logits
    assert seen == [torch.float32]
    assert logits.dtype == torch.bfloat16


def test_a_model_by_hand():
    # Width 8; two LSTMs of 8 cells: 4 x 8 x (8 + 8) = 512 weights and 64 biases; 5 experts of 2 x 8 x 4 = 64
    # weights, 2 active; gate and noise 5 x 8 each.
    mixture = MoELayer(8, 5, 2, 4, activation="relu", router=build_router("noisy_top_k", 8, 5, 2))
    cost = count_cost(LSTMDecoder(10, 8, [None, mixture]), context=9)
    assert cost.flops["recurrent"] == 2 * 2 * 512
    assert cost.flops["experts"] == 2 * 2 * 64
    assert cost.flops["router"] == 2 * 2 * 40
    assert cost.flops["head"] == 2 * 10 * 8
    assert cost.inner_operations == 2 * 512 + 2 * 64 + 2 * 40
    assert cost.inner_parameters == 2 * (512 + 64) + 5 * 64 + 2 * 40
    assert cost.total_parameters == cost.inner_parameters + 2 * 80
    assert cost.total_parameters - cost.active_parameters == 3 * 64


def test_a_projected_lstm_and_two_levels_of_gates_by_hand():
    # 24 cells from 8 and to 8: 4 x 24 x 16 + 24 x 8; 6 groups of 2 experts, of which a token chooses 2.
    router = build_router("hierarchical", 8, 12, 4, num_groups=6)
    mixture = MoELayer(8, 12, 4, 4, activation="relu", router=router)
    cost = count_cost(LSTMDecoder(10, 8, [mixture], lstm_width=24), context=9)
    assert cost.flops["recurrent"] == 2 * (4 * 24 * 16 + 24 * 8)
    assert cost.flops["router"] == 2 * 2 * (6 * 8 + 12 * 8)
    assert cost.inner_operations == 4 * 24 * 16 + 24 * 8 + 4 * 64 + 2 * (6 * 8 + 2 * 2 * 8)


def test_dense_layers_are_none_shallow_or_deep():
    assert dense_layer(8, 0) is None
    assert type(dense_layer(8, 12)) is MLP
    deep = dense_layer(8, 12, 4)
    assert isinstance(deep, DeepMLP)
    assert sum(p.numel() for p in deep.parameters()) == 2 * 8 * 12 + 3 * 12 * 12
    with pytest.raises(UserError, match="ffn_depth 0; allowed: 1 or more"):
        dense_layer(8, 12, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 1.0}, "dropout 1.0; allowed: 0 or more and below 1"),
        ({"lstm_width": 16}, "lstm_width 16 with width 16; allowed: more than the width"),
        ({"context": 0}, "context 0"),
        ({"feed_forwards": []}, "0 layers; allowed: 1 or more"),
    ],
)
def test_sizes_that_no_model_has(changes: dict[str, Any], message: str):
    given: dict[str, Any] = {"feed_forwards": [None]} | changes
    with pytest.raises(UserError, match=message) as caught:
        LSTMDecoder(VOCAB, WIDTH, **given)
    assert "\n" not in str(caught.value)


def test_a_text_beyond_the_context_is_refused():
    model = decoder()
    with pytest.raises(UserError, match="21 positions in a model of context 20"):
        model(texts(21))
    cache = model.new_cache(3)
    model(texts(20), cache)
    with pytest.raises(UserError, match="21 positions"):
        model(texts(1), cache)


def test_lstm_weights_are_parameters_that_train():
    model = LSTMDecoder(VOCAB, WIDTH, [None])
    model(texts()).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert isinstance(model.layers[0].lstm, nn.LSTM)
