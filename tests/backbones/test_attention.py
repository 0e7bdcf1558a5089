"""Attention against definitions written another way: complex rotations, a loop over heads and positions."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from gatewright.backbones import Attention, LayerCache, RMSNorm, RotaryPositions
from gatewright.backbones.attention import rotate
from gatewright.errors import UserError

HEAD_DIM, WIDTH, LENGTH = 4, 6, 7


def turned_by_hand(vector: list[float], position: int, theta: float) -> list[float]:
    """RoPE of one head as complex numbers: coordinates i and i + d/2 are one number, turned by its angle."""
    half = len(vector) // 2
    numbers = [complex(vector[i], vector[i + half]) for i in range(half)]
    turned = [z * cmath.exp(1j * position / theta ** (2 * i / len(vector))) for i, z in enumerate(numbers)]
    return [z.real for z in turned] + [z.imag for z in turned]


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
def test_rotary_positions_are_complex_rotations(theta: float):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    result = rotate(x, *RotaryPositions(8, theta).angles(100, 5, x.device))
    for b in range(2):
        for h in range(3):
            for s in range(5):
                expected = turned_by_hand(x[b, h, s].tolist(), 100 + s, theta)
                assert result[b, h, s].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_rotation_by_hand():
    # head_dim 2 at position 1: one pair, angle 1 radian. (1, 0) becomes (cos 1, sin 1).
    x = torch.tensor([[[[1.0, 0.0]]]])
    cos, sin = (t.float() for t in RotaryPositions(2).angles(1, 1, x.device))
    assert rotate(x, cos, sin).flatten().tolist() == pytest.approx([math.cos(1), math.sin(1)])


def test_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    rotary = RotaryPositions(8)

    def score(i: int, j: int) -> float:
        at_i, at_j = rotary.angles(i, 1, q.device), rotary.angles(j, 1, q.device)
        return float((rotate(q, *at_i) * rotate(k, *at_j)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def normed(row: list[float], scale: list[float], eps: float = 1e-5) -> list[float]:
    root = math.sqrt(sum(v * v for v in row) / len(row) + eps)
    return [v / root * s for v, s in zip(row, scale, strict=True)]


def slow_attention(module: Attention, x: Tensor, theta: float) -> list[list[float]]:
    """Return [S, D] for one text x [S, D]: Python numbers, one head and position at a time."""
    h, group = module.num_heads, module.num_heads // module.num_kv_heads

    def project(weight: Tensor, row: Tensor) -> list[float]:
        return (weight @ row).tolist()

    def heads(values: list[float]) -> list[list[float]]:
        return [values[i : i + HEAD_DIM] for i in range(0, len(values), HEAD_DIM)]

    queries, keys, values = [], [], []
    for s, row in enumerate(x):
        q, k = project(module.query.weight, row), project(module.key.weight, row)
        if module.qk_norm == "width":
            q, k = (
                normed(q, module.query_norm.weight.tolist()),
                normed(k, module.key_norm.weight.tolist()),
            )
        split_q, split_k = heads(q), heads(k)
        if module.qk_norm == "head":
            split_q = [normed(v, module.query_norm.weight.tolist()) for v in split_q]
            split_k = [normed(v, module.key_norm.weight.tolist()) for v in split_k]
        queries.append([turned_by_hand(v, s, theta) for v in split_q])
        keys.append([turned_by_hand(v, s, theta) for v in split_k])
        values.append(heads(project(module.value.weight, row)))
    out = []
    for s in range(len(x)):
        mixed: list[float] = []
        for head in range(h):
            own = head // group
            scores = [
                sum(a * b for a, b in zip(queries[s][head], keys[t][own], strict=True)) / math.sqrt(HEAD_DIM)
                for t in range(s + 1)
            ]
            powers = [math.exp(score) for score in scores]
            mixed += [
                sum(p * values[t][own][i] for t, p in enumerate(powers)) / sum(powers)
                for i in range(HEAD_DIM)
            ]
        out.append((module.output.weight @ torch.tensor(mixed, dtype=torch.float64)).tolist())
    return out


def attention(num_heads: int, num_kv_heads: int, qk_norm: str = "none") -> Attention:
    torch.manual_seed(3)
    module = Attention(WIDTH, num_heads, num_kv_heads, HEAD_DIM, qk_norm=qk_norm).double()
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, RMSNorm)):
            norm.weight.uniform_(0.5, 2)
    return module


def angles(start: int, length: int) -> tuple[Tensor, Tensor]:
    return RotaryPositions(HEAD_DIM, 100.0).angles(start, length, torch.device("cpu"))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("qk_norm", ["none", "head", "width"])
def test_attention_is_the_slow_loop(num_heads: int, num_kv_heads: int, qk_norm: str):
    module = attention(num_heads, num_kv_heads, qk_norm)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    result = module(x, *angles(0, LENGTH))
    for text in range(2):
        expected = torch.tensor(slow_attention(module, x[text], 100.0), dtype=torch.float64)
        torch.testing.assert_close(result[text], expected, rtol=1e-10, atol=1e-12)


def test_qk_norms_have_the_shapes_that_their_names_say():
    assert attention(4, 2, "head").query_norm.weight.shape == (HEAD_DIM,)
    assert attention(4, 2, "head").key_norm.weight.shape == (HEAD_DIM,)
    assert attention(4, 2, "width").query_norm.weight.shape == (4 * HEAD_DIM,)
    assert attention(4, 2, "width").key_norm.weight.shape == (2 * HEAD_DIM,)
    assert not hasattr(attention(4, 2), "query_norm")


@pytest.mark.parametrize("pieces", [(7,), (1,) * 7, (3, 4), (3, 1, 2, 1), (1, 6)])
@pytest.mark.parametrize("qk_norm", ["none", "width"])
def test_a_cache_gives_the_same_in_any_pieces(pieces: tuple[int, ...], qk_norm: str):
    module = attention(4, 2, qk_norm)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    whole = module(x, *angles(0, LENGTH))
    empty = torch.zeros(2, 2, LENGTH, HEAD_DIM, dtype=torch.float64)
    cache, out = LayerCache(empty.clone(), empty.clone()), []
    with torch.no_grad():
        for piece in pieces:
            start = cache.length
            out.append(module(x[:, start : start + piece], *angles(start, piece), cache))
    torch.testing.assert_close(torch.cat(out, dim=1), whole, rtol=1e-12, atol=1e-14)


def test_a_full_cache_is_refused():
    module = attention(4, 2)
    empty = torch.zeros(1, 2, 3, HEAD_DIM, dtype=torch.float64)
    cache = LayerCache(empty.clone(), empty.clone())
    with pytest.raises(UserError, match="4 positions in a cache of 3"):
        module(torch.randn(1, 4, WIDTH, dtype=torch.float64), *angles(0, 4), cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WIDTH, 4, 3, 4), "num_heads 4 with num_kv_heads 3"),
        ((WIDTH, 0, 0, 4), "num_heads 0"),
    ],
)
def test_heads_that_do_not_divide_are_refused(arguments: tuple[int, ...], message: str):
    with pytest.raises(UserError, match=message):
        Attention(*arguments)


def test_an_unknown_norm_and_an_odd_head_are_refused():
    with pytest.raises(UserError, match="did you mean 'width'"):
        Attention(WIDTH, 2, 2, 4, qk_norm="widht")
    with pytest.raises(UserError, match="head_dim 3"):
        RotaryPositions(3)


def test_rms_norm_by_hand():
    # Mean square of (3, 4) is 12.5; with weight (2, 1): 3/sqrt(12.5) * 2 and 4/sqrt(12.5).
    norm = RMSNorm(2, eps=0.0).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 1.0]))
    result = norm(torch.tensor([3.0, 4.0], dtype=torch.float64)).tolist()
    assert result == pytest.approx([6 / math.sqrt(12.5), 4 / math.sqrt(12.5)], abs=1e-14)


def test_rms_norm_computes_wide_and_returns_narrow():
    # The square of 1e4 overflows fp16 (largest 65504): only a wide norm gives 1.
    half = torch.full((4,), 1.0e4, dtype=torch.float16)
    result = RMSNorm(4)(half)
    assert result.dtype == torch.float16
    assert result.tolist() == pytest.approx([1.0] * 4, rel=1e-3)
