"""The recurrent model of pairs against one written in loops; its attention by hand; beams over its cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.backbones import RecurrentEncoderDecoder, SourceAttention, dense_layer
from gatewright.backbones.lstm_attention import turned
from gatewright.beams import BeamSearch, beam_search
from gatewright.errors import UserError
from gatewright.parts import MoELayer
from tests.backbones.test_lstm import below, lstm, mix

VOCAB, WIDTH, END = 30, 8, 29


def pair_model(lstm_width: int = 0, **changes: Any) -> RecurrentEncoderDecoder:
    """Return a small fp64 model with a mixture in each stack, and a dense layer above the decoder's."""
    torch.manual_seed(0)
    mixtures = [MoELayer(WIDTH, 5, 2, 6, activation="relu", weights="softmax_selected") for _ in range(2)]
    layers = [mixtures[0]], [mixtures[1], dense_layer(WIDTH, 10)]
    model = RecurrentEncoderDecoder(VOCAB, WIDTH, *layers, lstm_width=lstm_width, **changes).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sources of 6, 3 and 4 ids and targets of 5, 2 and 4, with their masks."""
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(0, VOCAB, (3, 6), generator=generator)
    target = torch.randint(0, VOCAB, (3, 5), generator=generator)
    masks = [torch.arange(n) < torch.tensor(own).unsqueeze(1) for n, own in ((6, [6, 3, 4]), (5, [5, 2, 4]))]
    return source, target, *masks


def test_attention_by_hand():
    # tanh(ln 2) = (4 - 1) / (4 + 1) = 0.6 and tanh(ln 3) = (9 - 1) / (9 + 1) = 0.8.
    one = SourceAttention(2, 2).double()
    ln2, ln3 = math.log(2), math.log(3)
    with torch.no_grad():
        one.u.copy_(torch.tensor([[ln2, 0.0], [0.0, ln3]]))
        one.w.copy_(torch.tensor([[ln3, 0.0], [0.0, ln2]]))
        one.v.copy_(torch.tensor([2.0, -1.0]))
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]], dtype=torch.float64)
    source = one.source(x, torch.tensor([[True, True, False]]))
    # x_1 U = (ln 2, 0) and x_2 U = (0, ln 3), of which the keys are V tanh: (2 0.6, 0) and (0, -0.8).
    torch.testing.assert_close(
        source.keys[0, :2], torch.tensor([[1.2, 0.0], [0.0, -0.8]], dtype=torch.float64)
    )
    # y W = (ln 3, ln 2): A(x_1, y) = 2 0.6 0.8 = 0.96 and A(x_2, y) = -0.8 0.6 = -0.48.
    first = 1 / (1 + math.exp(-0.48 - 0.96))
    seen = one(torch.ones(1, 2, dtype=torch.float64), source)
    torch.testing.assert_close(seen, torch.tensor([[first, 1 - first]], dtype=torch.float64))
    # y = 0 asks for nothing: the mean of what is no padding.
    seen = one(torch.zeros(1, 2, dtype=torch.float64), source)
    torch.testing.assert_close(seen, torch.tensor([[0.5, 0.5]], dtype=torch.float64))


def layers(rows: list[Tensor], w: dict[str, Tensor], stack: str, count: int) -> list[Tensor]:
    """Rows of one text through the layers above a stack's bottom one."""
    for i in range(count):
        own = below(w, f"{stack}.{i}.feed_forward.")
        if "router.weight" in own:
            rows = [x + torch.sigmoid(mix(x, own, 2)) for x in rows]
        else:
            rows = [x + torch.sigmoid(own["w_down"] @ (own["w_in"] @ x).clamp(min=0)) for x in rows]
        steps = lstm(rows, below(w, f"{stack}.{i}.lstm."))
        rows = [x + y for x, y in zip(rows, steps, strict=True)]
    return rows


def slow(w: dict[str, Tensor], source: list[int], target: list[int]) -> Tensor:
    """Return logits [S, V] of one pair, a position at a time."""
    rows = [w["embedding.weight"][i] for i in source]
    there = lstm(rows, below(w, "source_bottom.forwards."))
    back = lstm(rows[::-1], below(w, "source_bottom.backwards."))[::-1]
    rows = [x + y + z for x, y, z in zip(rows, there, back, strict=True)]
    states = layers(rows, w, "encoder", 1)
    a, own = below(w, "target_bottom.attention."), below(w, "target_bottom.lstm.")
    inputs: list[Tensor] = []
    out: list[Tensor] = []
    for i in target:
        h = lstm(inputs, own)[-1] if inputs else torch.zeros(WIDTH, dtype=torch.float64)
        scores = torch.stack(
            [(a["v"] * torch.tanh(a["u"] @ x) * torch.tanh(a["w"] @ h)).sum() for x in states]
        )
        context = sum(p * x for p, x in zip(torch.softmax(scores, 0), states, strict=True))
        assert isinstance(context, Tensor)
        inputs.append(torch.cat([w["embedding.weight"][i], context]))
        out.append(w["embedding.weight"][i] + lstm(inputs, own)[-1])
    return torch.stack([w["head.weight"] @ x for x in layers(out, w, "decoder", 2)])


@pytest.mark.parametrize("lstm_width", [0, 12])
def test_logits_and_gradients_are_the_slow_ones_and_padding_is_nothing(lstm_width: int):
    model, (source, target, source_mask, target_mask) = pair_model(lstm_width), pairs()
    logits = model(source, target, source_mask, target_mask).logits[target_mask]
    weights = torch.randn(logits.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    texts = [
        (s[m].tolist(), t[n].tolist())
        for s, t, m, n in zip(source, target, source_mask, target_mask, strict=True)
    ]
    expected = torch.cat([slow(copies, *text) for text in texts])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-11)
    theirs = torch.autograd.grad((expected * weights).sum(), list(copies.values()))
    for name, ours, own in zip(copies, gradients, theirs, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_enters_no_statistic_and_routers_have_their_stacks_names():
    model, (source, target, source_mask, target_mask) = pair_model(), pairs()
    stats = model(source, target, source_mask, target_mask).stats
    assert {name: int(own.tokens) for name, own in stats.items()} == {
        "encoder.layers.0.router": 6 + 3 + 4,
        "decoder.layers.0.router": 5 + 2 + 4,
    }
    assert set(model.routers()) == set(stats)


def test_a_text_is_turned_to_its_own_last_token():
    x = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    assert turned(x, mask).flatten().tolist() == [2, 1, 0, 3, 7, 6, 5, 4]
    assert turned(x, None).flatten().tolist() == [3, 2, 1, 0, 7, 6, 5, 4]


@pytest.mark.parametrize("lstm_width", [0, 12])
def test_the_cache_gives_the_same_logits_and_takes_rows(lstm_width: int):
    model, (source, target, mask, _) = pair_model(lstm_width).eval(), pairs()
    with torch.no_grad():
        encoded = model.encode(source, mask)
        whole = model.decode(target, encoded).logits
        cache = model.new_cache(encoded, 5)
        first = model.decode(target[:, :2], cache).logits
        rows = torch.tensor([2, 0, 0])
        cache.take(rows)
        second = model.decode(target[rows, 2:], cache, only_last=True).logits
    torch.testing.assert_close(first, whole[:, :2], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(second, whole[rows, -1:], rtol=1e-11, atol=1e-12)
    assert cache.length == 5


def test_one_beam_is_greedy_and_more_find_no_less():
    model, (source, _, mask, _) = pair_model().eval(), pairs()
    greedy, wide = (
        beam_search(model, source, start=END, end=END, source_mask=mask, search=BeamSearch(beams, 0.0, 7))
        for beams in (1, 4)
    )
    for row, (one, best) in enumerate(zip(greedy, wide, strict=True)):
        ids = [END]
        with torch.no_grad():
            for _ in range(7):
                out = model(source[row : row + 1], torch.tensor([ids]), mask[row : row + 1]).logits[0, -1]
                ids.append(int(out.argmax()))
                if ids[-1] == END:
                    break
        assert one[0].ids == [i for i in ids[1:] if i != END]
        assert best[0].score >= one[0].score - 1e-9


def test_dropout_follows_the_key_and_is_off_in_evaluation():
    model, (source, target, *masks) = pair_model(dropout=0.5), pairs()
    one, same, other = (model(source, target, *masks, key=torch.tensor(k)).logits for k in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    model.eval()
    torch.testing.assert_close(
        model(source, target, *masks).logits, pair_model().eval()(source, target, *masks).logits
    )


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match="lstm_width 8 with width 8; allowed: more than the width"):
        pair_model(lstm_width=8)
    with pytest.raises(UserError, match=r"dropout 1\.0; allowed: 0 or more and below 1"):
        pair_model(dropout=1.0)
    with pytest.raises(UserError, match="target_context 0; allowed: 1 or more of each"):
        pair_model(target_context=0)
