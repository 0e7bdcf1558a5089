"""Causal attention: its definition against a loop over positions, and every form against the definition in
values and gradients; natively also the same bits for every number of threads, and clear refusals.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gatewright.errors import UserError
from gatewright.kernels import attend, choose_attention, native
from gatewright.kernels.attention import SWITCH, by_matmuls
from tests.kernels.variants import near

needs_native = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
BOUND = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}
# Batch, heads, key heads, queries, past, head_dim: around blocks of 32, chunks of 256 and a lane's end; the
# few queries of decoding, whose keys are cut at 64 and 1024; heads that share keys.
CASES = [
    (2, 2, 2, 32, 0, 8),
    (1, 4, 2, 33, 0, 20),
    (2, 2, 1, 70, 5, 32),
    (1, 2, 2, 300, 0, 16),
    (1, 1, 1, 530, 30, 34),
    (1, 2, 1, 64, 600, 2),
    (2, 6, 2, 1, 3, 16),
    (1, 2, 2, 1, 63, 96),
    (1, 4, 2, 8, 1020, 24),
]


def draw(case: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v and a gradient; q and k lie as a linear map leaves them, v as a cache does."""
    batch, heads, kv_heads, length, past, head_dim = case
    made = torch.Generator().manual_seed(length + past)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).to(dtype)

    q = 2 * normal(batch, length, heads, head_dim).transpose(1, 2)
    k = normal(batch, past + length, kv_heads, head_dim).transpose(1, 2)
    v, due = normal(batch, kv_heads, past + length, head_dim), normal(batch, heads, length, head_dim)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), due]


def everything(form: str, q: Tensor, k: Tensor, v: Tensor, due: Tensor) -> list[Tensor]:
    """Return the output and the three gradients."""
    y = attend(q, k, v, k.shape[2] - q.shape[2], form)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), due)]


def exact(q: Tensor, k: Tensor, v: Tensor, due: Tensor) -> list[Tensor]:
    """Return what the definition says in fp64."""
    wide = [one.detach().double().requires_grad_() for one in (q, k, v)]
    y = by_matmuls(*wide, k.shape[2] - q.shape[2])
    return [y.detach(), *torch.autograd.grad(y, wide, due.double())]


@pytest.mark.parametrize("form", ["matmul", "flash"])
@pytest.mark.parametrize("past", [0, 3])
def test_the_definition_is_a_loop_over_positions(form: str, past: int):
    q, k, v, _ = draw((2, 4, 2, 3, past, 4), torch.float64)
    y = attend(q, k, v, past, form)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(3)):
        keys, values = k[b, h // 2].tolist(), v[b, h // 2].tolist()
        scores = [
            sum(x * z for x, z in zip(q[b, h, i].tolist(), keys[j], strict=True)) / 2
            for j in range(past + i + 1)
        ]
        powers = [math.exp(one) for one in scores]
        mixed = [sum(p * values[j][c] for j, p in enumerate(powers)) / sum(powers) for c in range(4)]
        assert y[b, h, i].tolist() == pytest.approx(mixed, abs=1e-12)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_native_equals_the_definition(engine: str, case: tuple[int, ...], dtype: torch.dtype):
    given = draw(case, dtype)
    for name, found, wanted in zip("yqkv", everything("native", *given), exact(*given), strict=True):
        assert found.dtype == dtype
        near(found, wanted, BOUND[dtype], name)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_every_number_of_threads(engine: str, dtype: torch.dtype):
    before = torch.get_num_threads()
    cases = [draw((2, 4, 2, 300, 0, 16), dtype), draw((1, 2, 1, 2, 3000, 16), dtype)]
    try:
        torch.set_num_threads(1)
        expected = [everything("native", *case) for case in cases]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for case, wanted in zip(cases, expected, strict=True):
                for one, other in zip(everything("native", *case), wanted, strict=True):
                    assert torch.equal(one, other), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@needs_native
def test_joining_the_heads_again_copies_nothing():
    for one in everything("native", *draw((2, 4, 2, 40, 0, 8), torch.float32)):
        assert one.transpose(1, 2).is_contiguous()


@needs_native
def test_any_strides_mean_the_same():
    q, k, v, due = draw((2, 2, 2, 40, 0, 8), torch.float32)
    expected = everything("native", q, k, v, due)
    turned = [one.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for one in (q, k, v, due)]
    found = everything("native", *(one.requires_grad_() for one in turned[:3]), turned[3])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    y = attend(q, k, v, 0, "native")
    ones = torch.autograd.grad(y.sum(), q)[0]  # a gradient that is an expanded view
    assert torch.equal(ones, everything("native", q, k, v, torch.ones_like(due))[1])


@needs_native
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_cache_may_be_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]):
    q, k, v, _ = (one.detach().to(dtypes[0]) for one in draw((2, 4, 2, 2, 70, 16), torch.bfloat16))
    narrow = k.to(dtypes[1]), v.to(dtypes[1])
    with torch.no_grad():
        assert choose_attention(q, narrow[0])[0] == "native"
        y = attend(q, *narrow, 70)
    assert y.dtype == dtypes[0]
    near(y, by_matmuls(q.double(), k.double(), v.double(), 70), BOUND[dtypes[0]])
    q.requires_grad_()
    assert choose_attention(q, narrow[0])[0] != "native"
    found = attend(q, *narrow, 70)  # a copy in q's dtype
    near(found.detach(), y.double(), BOUND[torch.bfloat16])
    assert torch.autograd.grad(found.sum(), q)[0].dtype == dtypes[0]


@needs_native
def test_large_scores_do_not_overflow_and_lost_ones_weigh_nothing():
    for length in (8, 80):
        q, k, v, due = draw((1, 1, 1, length, 0, 4), torch.float32)
        given = [(q * 1e4).detach().requires_grad_(), k, v, due]
        y, *gradients = everything("native", *given)
        near(y, exact(*given)[0], 3e-2)  # scores of 1e5 have an error of 1e-2 in fp32
        assert all(one.isfinite().all() for one in gradients)


@needs_native
def test_a_number_that_is_none_stays_none():
    for length in (4, 40):
        q, k, v, _ = draw((1, 2, 2, length, 0, 4), torch.float32)
        broken = q.detach().clone()
        broken[0, 1, 2] = math.nan
        y = attend(broken, k, v, 0, "native")
        assert y[0, 1, 2].isnan().all()
        y[0, 1, 2] = 0.0
        assert y.isfinite().all()


@needs_native
def test_recomputed_gradients_are_the_same():
    q, k, v, due = draw((2, 2, 1, 40, 0, 8), torch.float32)
    kept = everything("native", q, k, v, due)[1:]
    y = checkpoint(attend, q, k, v, use_reentrant=False)
    again = torch.autograd.grad(y, (q, k, v), due)
    assert all(torch.equal(one, other) for one, other in zip(again, kept, strict=True))


@needs_native
@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4), (2, 0, 5, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]):
    q = torch.ones(shape, requires_grad=True)
    k = torch.ones(shape[0], 2, shape[2], 4, requires_grad=True)
    y = attend(q, k, k, 0, "native")
    assert y.shape == shape
    y.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == shape
    assert k.grad is not None
    assert (k.grad == 0).all()


@needs_native
def test_the_operators_keep_their_promises_to_torch():
    for case in ((2, 4, 2, 40, 0, 8), (1, 2, 2, 2, 5, 4)):
        q, k, v, due = draw(case, torch.float32)
        torch.library.opcheck(torch.ops.gatewright.attention_forward.default, (q, k, v, case[4]))
        fixed = [one.detach() for one in (q, k, v)]
        y, lse = torch.ops.gatewright.attention_forward(*fixed, case[4])
        back = (due, *fixed, y, lse, case[4])
        torch.library.opcheck(torch.ops.gatewright.attention_backward.default, back)


@needs_native
def test_under_autocast_bf16_computes():
    q, k, v, _ = (one.detach() for one in draw((1, 2, 2, 40, 0, 8), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, attend(q.bfloat16(), k.bfloat16(), v.bfloat16()))


@needs_native
def test_what_does_not_fit_is_refused():
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    op = torch.ops.gatewright
    with pytest.raises(ValueError, match="5 keys for 3 queries behind 1"):
        op.attention_forward(q, k, k, 1)
    with pytest.raises(ValueError, match="do not fit"):
        op.attention_forward(q, k, k[:, :, 1:], 2)
    with pytest.raises(ValueError, match="2 heads over 3 of keys"):
        op.attention_forward(q, torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 3, 4), 0)
    with pytest.raises(ValueError, match="head_dim 5"):
        op.attention_forward(*[torch.zeros(1, 2, 3, 5)] * 3, 0)
    with pytest.raises(ValueError, match="takes float32"):
        op.attention_forward(q.double(), k.double(), k.double(), 2)
    y, lse = op.attention_forward(q, k, k, 2)
    with pytest.raises(ValueError, match="log-sum-exps"):
        op.attention_backward(y, q, k, k, y, lse[:, :, 1:], 2)
    with pytest.raises(ValueError, match="gradient"):
        op.attention_backward(y[:, :, 1:], q, k, k, y, lse, 2)
    with pytest.raises(UserError, match="form 'native' does not take"):
        attend(q.double(), q.double(), q.double(), 0, "native")


def test_wrong_words_and_sizes_are_one_line(monkeypatch: pytest.MonkeyPatch):
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match="did you mean 'flash'"):
        attend(q, q, q, 0, "flush")
    with pytest.raises(UserError, match="3 positions behind 1 over 3 keys"):
        attend(q, q, q, 1)
    monkeypatch.setenv(SWITCH, "fast")
    with pytest.raises(UserError, match=f"{SWITCH}=fast is unknown"):
        attend(q, q, q)


def test_the_choice_depends_on_what_is_given_alone(monkeypatch: pytest.MonkeyPatch):
    q, long = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2000, 4)
    assert choose_attention(q.double(), q.double())[0] == "flash"
    with native.left_out():
        assert choose_attention(q, q)[0] == "flash"
        assert choose_attention(q.bfloat16(), q.bfloat16())[0] == "matmul"
        assert choose_attention(long.bfloat16(), long.bfloat16())[0] == "flash"
    monkeypatch.setenv(SWITCH, "matmul")
    assert choose_attention(q, q) == ("matmul", "asked for by name")
    assert choose_attention(q, q, "flash")[0] == "flash"
    monkeypatch.setenv(SWITCH, "native")
    assert choose_attention(q.double(), q.double())[0] == "flash", "native where it takes them"
    monkeypatch.delenv(SWITCH)
    if native.is_ready():
        assert choose_attention(q, q)[0] == choose_attention(long, long)[0] == "native"
