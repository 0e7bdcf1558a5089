"""Blocks in two operators while decoding: the same bits as module by module, and nobody passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gatewright.backbones import Decoder, decoding, transformer
from gatewright.errors import UserError
from gatewright.kernels import native
from gatewright.parts import MLP, Capacity, MoELayer, quantise_experts

pytestmark = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
D, V = 16, 23


def decoder(dtype: torch.dtype = torch.float32, layers: Any = None, **options: Any) -> Decoder:
    torch.manual_seed(0)
    feed_forwards = layers or [
        MoELayer(D, 6, 2, 24),
        MLP(D, 24),
        MoELayer(D, 5, 1, 16, router="loss_free"),
        MoELayer(D, 4, 2, 16, weights="raw", activation="gelu", expert_bias=True),
    ]
    model = Decoder(V, D, 4, feed_forwards, num_kv_heads=2, head_dim=8, context=32, **options)
    return model.to(dtype).eval()


@torch.no_grad()
def steps(model: Decoder, batch: int, lengths: list[int], **how: Any) -> tuple[list[torch.Tensor], Any]:
    """Return the logits of each step and the cache, of texts that grow by these lengths."""
    how = {"with_stats": False, **how}
    tokens = torch.randint(V, (batch, sum(lengths)), generator=torch.Generator().manual_seed(1))
    cache, out, at = model.new_cache(batch), [], 0
    for length in lengths:
        out.append(model(tokens[:, at : at + length], cache, **how).logits)
        at += length
    return out, cache


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called in one piece."""
    seen: list[str] = []
    for name in ("decode_attention", "decode_experts"):
        inner = getattr(decoding, name)

        def spy(*given: Any, _inner: Any = inner, _name: str = name, **named: Any) -> Any:
            seen.append(_name)
            return _inner(*given, **named)

        monkeypatch.setattr(decoding, name, spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "lengths"), [(1, [9, 1, 1, 3]), (3, [4, 1, 2]), (8, [2, 1])])
def test_the_bits_are_those_of_module_by_module(
    dtype: torch.dtype, batch: int, lengths: list[int], calls: list[str], monkeypatch: pytest.MonkeyPatch
):
    model = decoder(dtype)
    found, cache = steps(model, batch, lengths)
    few = sum(batch * length <= 8 for length in lengths)
    assert calls.count("decode_attention") == 4 * few
    assert calls.count("decode_experts") == 3 * few
    monkeypatch.setattr(transformer, "few_tokens", lambda _: False)
    calls.clear()
    expected, other = steps(model, batch, lengths)
    assert not calls
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert one.length == two.length == sum(lengths)
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.values, two.values)


def test_int8_experts_go_the_same_way(calls: list[str], monkeypatch: pytest.MonkeyPatch):
    model = decoder()
    quantise_experts(model)
    found, _ = steps(model, 2, [1, 1])
    assert calls.count("decode_experts") == 6
    monkeypatch.setattr(transformer, "few_tokens", lambda _: False)
    for one, two in zip(found, steps(model, 2, [1, 1])[0], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["attention", "attention.query", "attention_norm", "attention.output"])
def test_who_watches_attention_is_called(name: str, calls: list[str]):
    model, seen = decoder(), []
    model.layers[0].get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    steps(model, 1, [1])
    assert seen == [name]
    assert calls.count("decode_attention") == 3


@pytest.mark.parametrize("name", ["feed_forward", "feed_forward.router", "feed_forward.experts"])
def test_who_watches_experts_is_called(name: str, calls: list[str]):
    model, seen = decoder(), []
    module = model.layers[0].get_submodule(name)
    if name == "feed_forward.router":  # its forward is what a caller may replace
        own = module.forward
        module.forward = lambda x: (seen.append(name), own(x))[1]  # type: ignore[method-assign]
    else:
        module.register_forward_hook(lambda *_: seen.append(name))
    steps(model, 1, [1])
    assert seen == [name]
    assert calls.count("decode_experts") == 2


def test_global_hooks_see_every_module(calls: list[str]):
    model, seen = decoder(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        steps(model, 1, [1])
    finally:
        handle.remove()
    assert not calls
    assert MoELayer in seen


@pytest.mark.parametrize(
    "layer",
    [
        lambda: MoELayer(D, 4, 2, 16, num_shared_experts=1),
        lambda: MoELayer(D, 4, 2, 16, capacity=Capacity(1.0)),
        lambda: MoELayer(D, 4, 2, 16, backend="reference"),
        lambda: MoELayer(D, 4, 2, 16, router="expert_choice"),
        lambda: MoELayer(D, 4, 1, 16, router="llama4"),
        lambda: MoELayer(D, 4, 2, 16, router="gpt_oss"),
        lambda: MoELayer(D, 4, 2, 16, router_dtype=torch.bfloat16),
    ],
)
def test_other_layers_are_computed_as_they_are(layer: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(3)
    model = decoder(layers=[layer()])
    found, _ = steps(model, 2, [2, 1])
    assert "decode_experts" not in calls
    monkeypatch.setattr(transformer, "few_tokens", lambda _: False)
    for one, two in zip(found, steps(model, 2, [2, 1])[0], strict=True):
        assert torch.equal(one, two)


def test_other_calls_are_computed_module_by_module(calls: list[str], monkeypatch: pytest.MonkeyPatch):
    model = decoder()
    steps(model, 1, [1], with_stats=True)
    steps(model, 3, [3])  # nine tokens
    with torch.autocast("cpu", torch.bfloat16):
        steps(model, 1, [1])
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64), with_stats=False)  # no cache
    with native.left_out():
        steps(model, 1, [1])
    monkeypatch.setenv("GATEWRIGHT_ATTENTION", "matmul")
    steps(model, 1, [1])
    assert not calls
    monkeypatch.delenv("GATEWRIGHT_ATTENTION")
    cache = model.new_cache(1)
    logits = model(torch.zeros(1, 1, dtype=torch.int64), cache, with_stats=False).logits
    assert not calls
    assert logits.requires_grad
    steps(decoder(qk_norm="head"), 1, [1])
    assert "decode_attention" not in calls
    calls.clear()
    steps(decoder(torch.float64), 1, [1])
    assert not calls


def test_a_full_cache_is_refused_in_words():
    model = decoder()
    cache = model.new_cache(1, 2)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64), cache, with_stats=False)
        with pytest.raises(UserError, match="3 positions in a cache of 2"):
            model(torch.zeros(1, 1, dtype=torch.int64), cache, with_stats=False)


def test_sizes_are_checked_before_memory_is():
    x, norm, maps = torch.zeros(1, 1, D), torch.ones(D), [torch.zeros(32, D)] + 2 * [torch.zeros(16, D)]
    angles, keys = torch.zeros(1, 8), torch.zeros(1, 2, 4, 8)
    attention = torch.ops.gatewright.decode_attention
    back = torch.zeros(D, 32)
    assert attention(x, norm, 1e-5, *maps, back, angles, angles, keys, keys.clone(), 3).shape == x.shape
    for bad in (
        (x, norm, 1e-5, *maps, back, angles, angles, keys, keys.clone(), 4),
        (x, norm, 1e-5, *maps, back, angles, angles, keys, keys.clone(), -1),
        (x[0], norm, 1e-5, *maps, back, angles, angles, keys, keys.clone(), 0),
        (x, norm, 1e-5, *maps, back, angles, angles, keys, keys[:, :1].clone(), 0),
        (x, norm, 1e-5, maps[0], maps[0], maps[2], back, angles, angles, keys, keys.clone(), 0),
        (x, norm, 1e-5, *maps, torch.zeros(D, 8), angles, angles, keys, keys.clone(), 0),
    ):
        with pytest.raises(ValueError):
            attention(*bad)


def test_compilers_are_told_the_shapes():
    x, norm, maps = torch.randn(2, 1, D), torch.ones(D), [torch.randn(32, D)] + 2 * [torch.randn(16, D)]
    angles, keys = torch.zeros(1, 8), torch.zeros(2, 2, 4, 8)
    given = (x, norm, 1e-5, *maps, torch.randn(D, 32), angles, angles, keys, keys.clone(), 1)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gatewright.decode_attention.default, given, test_utils=checks)
    w = (torch.randn(4, 12, D), torch.randn(4, D, 6), None, None, None, None)
    words = (torch.randn(4, D), None, 2, "softmax", "raw", 1.0, -1e30)
    given = (x, torch.randn_like(x), norm, 1e-5, *words, *w, "swiglu")
    torch.library.opcheck(torch.ops.gatewright.decode_experts.default, given, test_utils=checks)
