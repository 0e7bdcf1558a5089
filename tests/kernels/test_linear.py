"""The linear map by expert: against a loop, in odd corners, and what compilers are told of the operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatewright.kernels import rows as rows_module
from gatewright.kernels.linear import linear_by_group
from gatewright.kernels.rows import aligned
from tests.kernels.plans import draw_inputs, draw_weights, plan_of

COUNTS = torch.tensor([3, 0, 4, 1])


def case(width: int, out: int, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return 10 rows, the last two behind the last expert's, and 4 matrices as they are stored."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(10, width, generator=draw).to(dtype)
    shape = (4, width, out) if transposed else (4, out, width)
    return rows.requires_grad_(), torch.randn(shape, generator=draw).to(dtype).requires_grad_()


def by_loop(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the 8 rows that belong to an expert, each through its matrix [out, width]."""
    owners = torch.repeat_interleave(torch.arange(4), COUNTS)
    return torch.stack([weights[e] @ row for e, row in zip(owners.tolist(), rows[:8], strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("width", "out"), [(8, 4), (8, 6), (3, 8), (3, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_gradients_equal_a_loop(dtype: torch.dtype, width: int, out: int, transposed: bool):
    rows, stored = case(width, out, dtype, transposed)
    weights = stored.mT if transposed else stored
    found, expected = linear_by_group(rows, weights, COUNTS)[:8], by_loop(rows, weights)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    direction = torch.linspace(-1, 1, expected.numel(), dtype=dtype).view_as(expected)
    one = torch.autograd.grad((found * direction).sum(), (rows, stored))
    other = torch.autograd.grad((expected * direction).sum(), (rows, stored))
    torch.testing.assert_close(one[0][:8], other[0][:8], rtol=bound, atol=bound)
    torch.testing.assert_close(one[1], other[1], rtol=bound, atol=bound)
    assert one[1].stride() == stored.stride(), "the gradient would have to be copied to be added up"


def test_rows_behind_the_last_expert_are_not_read():
    rows, weights = case(8, 4, torch.float32, False)
    with torch.no_grad():
        rows[8:] = torch.nan
    y = linear_by_group(rows, weights, COUNTS)
    grad = torch.ones_like(y)
    grad[8:] = torch.nan
    y.backward(grad)
    assert y[:8].isfinite().all()
    assert weights.grad is not None
    assert rows.grad is not None
    assert weights.grad.isfinite().all()
    assert rows.grad[:8].isfinite().all()


def test_no_rows_at_all():
    rows, weights = torch.zeros(0, 8, requires_grad=True), torch.ones(4, 6, 8, requires_grad=True)
    y = linear_by_group(rows, weights, COUNTS * 0)
    assert y.shape == (0, 6)
    y.sum().backward()
    assert weights.grad is not None
    assert (weights.grad == 0).all()


@pytest.mark.parametrize("hidden", [4, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_compilers_are_told_the_shapes_and_strides_that_come(hidden: int, biased: bool):
    # Ten columns of fp32 are 40 bytes: F.grouped_mm returns rows that stand 48 bytes apart.
    plan = plan_of([[1, 2], [2, 4], [4, 1]], 5)
    weights = draw_weights("swiglu", 5, 8, hidden, torch.float32, biased)
    x, combine = draw_inputs(plan, 8, torch.float32)
    args = (x, combine, weights.w_in, weights.w_down, weights.b_in, weights.b_down, None)
    views = (plan.token_ids, plan.counts, plan.slots, plan.all_kept, "swiglu", "output")
    ops = torch.ops.gatewright
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.grouped_experts.default, (*args, *views), test_utils=kinds)
    grad, pre = torch.ones_like(x), torch.randn(6, 2 * hidden)
    told = torch.library.opcheck(
        ops.grouped_experts_backward.default, (grad, pre, True, *args, *views), test_utils=kinds[2:]
    )
    assert set(told.values()) == {"SUCCESS"}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("width", "out"), [(8, 4), (8, 6), (3, 5)])
def test_compilers_are_told_the_strides_of_the_linear_map(transposed: bool, width: int, out: int):
    rows, stored = case(width, out, torch.float32, transposed)
    weights = stored.mT if transposed else stored
    ops, grad = torch.ops.gatewright, torch.ones(10, out)
    for op, args in (
        (ops.linear_by_group.default, (rows, weights, COUNTS)),
        (ops.linear_by_group_backward.default, (grad, rows, weights, COUNTS, True, True)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU, as far as the choice of matmuls asks."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)


@pytest.mark.parametrize("capable", [False, True])
def test_a_gpu_is_given_what_its_documentation_names(monkeypatch: pytest.MonkeyPatch, capable: bool):
    monkeypatch.setattr(rows_module, "_capable", lambda device: capable)

    def there(dtype: torch.dtype, start: int = 0) -> Tensor:
        return torch.zeros(7 * 16 + start, dtype=dtype)[start:].view(7, 16).as_subclass(OnGpu)

    assert aligned(there(torch.bfloat16)) == capable
    assert not aligned(there(torch.bfloat16, 1))
    assert not aligned(there(torch.bfloat16), there(torch.bfloat16)[:, :12])
    assert not aligned(there(torch.float32))
    assert not aligned(there(torch.float16))
    assert not aligned(torch.zeros(7, 16, dtype=torch.bfloat16, device="meta"))


def test_rows_that_start_apart_by_other_than_16_bytes_go_to_the_loop():
    wide = torch.randn(7, 10)
    assert aligned(wide[:, :8].contiguous())
    assert not aligned(wide[:, :8])
    assert not aligned(torch.randn(8, 8).t()[:, ::2])
