"""Latent attention against its equations in loops, its two forms against each other, and its cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.backbones import Decoder, LatentAttention, LatentSizes, RMSNorm, RotaryPositions, count_cost
from gatewright.errors import UserError
from gatewright.parts import MLP

WIDTH, HEADS, LENGTH = 10, 3, 7
SIZES = {"compressed": LatentSizes(5, 6, 4, 2, 3), "plain": LatentSizes(0, 6, 4, 2, 3)}


def latent(kind: str, **options: Any) -> LatentAttention:
    torch.manual_seed(2)
    module = LatentAttention(WIDTH, HEADS, SIZES[kind], **options).double()
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, RMSNorm)):
            norm.weight.uniform_(0.5, 2)
    return module


def angles(start: int, length: int) -> tuple[Tensor, Tensor]:
    return RotaryPositions(2, 100.0).angles(start, length, torch.device("cpu"))


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * scale


def turned(pair: Tensor, position: int) -> Tensor:
    """One pair of numbers by one radian per position: 100 ** 0 = 1."""
    cos, sin = math.cos(position), math.sin(position)
    return torch.stack([pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin])


def slow(module: LatentAttention, x: Tensor, score_factor: float = 1.0) -> Tensor:
    """Equations 9-19 of DeepSeek-V2 for one text [S, D]: one head and position at a time."""
    w = dict(module.named_parameters())
    s = module.sizes
    queries, keys, values = [], [], []
    for t, row in enumerate(x):
        c_q = rms(w["query_down.weight"] @ row, w["query_norm.weight"]) if s.query_rank else row
        q = (w["query.weight"] @ c_q).view(HEADS, -1)
        down = w["kv_down.weight"] @ row
        c_kv, k_r = rms(down[: s.kv_rank], w["kv_norm.weight"]), turned(down[s.kv_rank :], t)
        up = (w["kv_up.weight"] @ c_kv).view(HEADS, -1)
        queries.append([torch.cat([h[: s.head_dim], turned(h[s.head_dim :], t)]) for h in q])
        keys.append([torch.cat([h[: s.head_dim], k_r]) for h in up])
        values.append([h[s.head_dim :] for h in up])
    out = []
    for t in range(len(x)):
        mixed = []
        for h in range(HEADS):
            scores = torch.stack([queries[t][h] @ keys[u][h] for u in range(t + 1)])
            weights = (scores * score_factor / math.sqrt(s.head_dim + s.rotary_dim)).exp()
            mixed.append((weights / weights.sum()) @ torch.stack([values[u][h] for u in range(t + 1)]))
        out.append(w["output.weight"] @ torch.cat(mixed))
    return torch.stack(out)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("kind", SIZES)
def test_both_forms_are_the_slow_loop(kind: str, absorbed: bool):
    module = latent(kind, score_factor=1.7)
    module.absorbed = absorbed
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    found = module(x, *angles(0, LENGTH))
    for text in range(2):
        torch.testing.assert_close(found[text], slow(module, x[text], 1.7), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", SIZES)
def test_both_forms_have_the_same_gradients(kind: str):
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    grads = []
    for absorbed in (False, True):
        module = latent(kind)
        module.absorbed = absorbed
        module(x, *angles(0, 20)).square().sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("absorbed", [None, False, True])
@pytest.mark.parametrize("pieces", [(7,), (1,) * 7, (3, 4), (3, 1, 2, 1)])
def test_a_cache_of_latents_gives_the_same(pieces: tuple[int, ...], absorbed: bool | None):
    module = latent("compressed")
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    whole = module(x, *angles(0, LENGTH))
    module.absorbed = absorbed
    cache, out = module.new_cache(2, LENGTH, x, x.dtype), []
    with torch.no_grad():
        for piece in pieces:
            start = cache.length
            out.append(module(x[:, start : start + piece], *angles(start, piece), cache))
    torch.testing.assert_close(torch.cat(out, dim=1), whole, rtol=1e-10, atol=1e-12)
    assert cache.keys.shape == (2, 1, LENGTH, 6 + 2)
    assert cache.values.numel() == 0


def test_deepseek_v3_caches_576_numbers_per_token():
    with torch.device("meta"):
        module = LatentAttention(7168, 128, LatentSizes(1536, 512, 128, 64, 128))
        cache = module.new_cache(1, 10, torch.empty(0), torch.bfloat16)
    assert module.cached_numbers == 512 + 64 == 576
    assert cache.keys.numel() + cache.values.numel() == 10 * 576
    # Absorbed for one token and up to 170 at a time; (512 x 256) / (2 x 512 + 64 - 320) = 170.7.
    assert [module._absorbing_pays(n) for n in (1, 170, 171)] == [True, True, False]


def test_a_decoder_with_latents_costs_what_its_weights_say():
    sizes = LatentSizes(0, 16, 8, 4, 8)
    layers = [MLP(16, 24), MLP(16, 24)]
    attentions = [LatentAttention(16, 2, sizes) for _ in layers]
    model = Decoder(20, 16, 2, layers, attentions=attentions, rotary_dim=4, context=12)
    cost = count_cost(model, 9)
    weights = 16 * 2 * 12 + 16 * 20 + 16 * 2 * 16 + 2 * 8 * 16
    assert cost.flops["attention_projections"] == 2 * 2 * weights
    # 2 heads x (12 + 8) numbers, 5 keys on average, in 2 layers.
    assert cost.flops["attention_scores"] == 2 * 2 * 2 * 20 * 5
    assert model.new_cache(3).layers[1].keys.shape == (3, 1, 12, 20)


@pytest.mark.parametrize(
    "sizes", [(-1, 4, 4, 2, 4), (0, 0, 4, 2, 4), (0, 4, 4, 3, 4), (0, 4, 0, 2, 4), (0, 4, 4, 2, 0)]
)
def test_sizes_that_cannot_be_are_refused(sizes: tuple[int, ...]):
    with pytest.raises(UserError, match=f"kv_rank {sizes[1]}, head_dim {sizes[2]}"):
        LatentAttention(8, 2, LatentSizes(*sizes))


def test_angles_of_another_size_and_missing_attentions_are_refused():
    module = latent("plain")
    x = torch.randn(1, 2, WIDTH, dtype=torch.float64)
    with pytest.raises(UserError, match="4 rotary numbers; allowed: rotary_dim 2"):
        module(x, *RotaryPositions(4).angles(0, 2, x.device))
    with pytest.raises(UserError, match="0 attentions for 1 layers"):
        Decoder(8, 8, 2, [MLP(8, 8)], attentions=[])
