"""Rotary positions natively against their definition, and the tables that a model keeps of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gatewright.backbones import Decoder, RotaryPositions
from gatewright.backbones.attention import rotate, rotate_pair
from gatewright.kernels import native
from gatewright.parts import MLP
from tests.kernels.variants import near

needs_native = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
CPU = torch.device("cpu")


def draw(head_dim: int, dtype: torch.dtype, angles: torch.dtype) -> list[Tensor]:
    """Return q, k, cos, sin and gradients of both; cos and sin of any numbers, no two halves alike."""
    made = torch.Generator().manual_seed(head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    q, k = normal(2, 5, 3, head_dim).to(dtype).transpose(1, 2), normal(2, 1, 5, head_dim).to(dtype)
    cos, sin = normal(5, head_dim).to(angles), normal(5, head_dim).to(angles)
    due = normal(2, 3, 5, head_dim).to(dtype), normal(2, 1, 5, head_dim).to(dtype)
    return [q.requires_grad_(), k.requires_grad_(), cos, sin, *due]


@needs_native
@pytest.mark.parametrize("head_dim", [2, 6, 32, 36, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angles", [torch.float32, torch.bfloat16])
def test_the_native_turn_is_the_definition(head_dim: int, dtype: torch.dtype, angles: torch.dtype):
    q, k, cos, sin, *due = draw(head_dim, dtype, angles)
    found = rotate_pair(q, k, cos, sin)
    gradients = torch.autograd.grad(found, (q, k), due)
    wide = [one.detach().double().requires_grad_() for one in (q, k)]
    wanted = [rotate(one, cos.double(), sin.double()) for one in wide]
    exact = torch.autograd.grad(wanted, wide, [one.double() for one in due])
    for one, other in zip((*found, *gradients), (*wanted, *exact), strict=True):
        assert one.dtype == dtype
        assert one.transpose(1, 2).is_contiguous()
        near(one.detach(), other.detach(), 1e-6 if dtype == torch.float32 else 5e-3)


@needs_native
def test_the_same_bits_for_every_number_of_threads():
    before, q = torch.get_num_threads(), torch.randn(2, 3, 3000, 8)
    cos, sin = RotaryPositions(8).tables(0, 3000, CPU, torch.float32)
    try:
        torch.set_num_threads(1)
        expected = rotate_pair(q, q, cos, sin)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(rotate_pair(q, q, cos, sin), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_native
def test_the_operator_keeps_its_promises_to_torch():
    q, k, cos, sin, *_ = draw(6, torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.gatewright.rotate_pair.default, (q, k, cos, sin, False))
    with pytest.raises(ValueError, match="cos"):
        torch.ops.gatewright.rotate_pair(q, k, cos[1:], sin[1:], False)
    with pytest.raises(ValueError, match="takes float32"):
        torch.ops.gatewright.rotate_pair(q, k, cos.double(), sin.double(), False)


def test_tables_are_the_angles_and_computed_once():
    rotary = RotaryPositions(6)
    first = rotary.tables(0, 5, CPU, torch.float32)
    for start, length in ((0, 5), (3, 4), (7, 1), (6, 30), (0, 5)):
        for found, wanted in zip(
            rotary.tables(start, length, CPU, torch.float32), rotary.angles(start, length, CPU), strict=True
        ):
            assert torch.equal(found, wanted.float())
    again = rotary.tables(2, 3, CPU, torch.float32)
    assert again[0].data_ptr() != first[0].data_ptr(), "a longer table has taken its place"
    assert again[0].data_ptr() == rotary.tables(2, 9, CPU, torch.float32)[0].data_ptr()
    assert rotary.tables(0, 5, CPU, torch.bfloat16)[0].dtype == torch.bfloat16
    assert rotary.tables(0, 5, torch.device("meta"), torch.float32)[0].device.type == "meta"


def test_tables_are_no_state():
    torch.manual_seed(0)
    model = Decoder(10, 8, 2, [MLP(8, 8)])
    names = set(model.state_dict())
    tokens = torch.randint(0, 10, (1, 6))
    with torch.inference_mode():
        expected = model(tokens).logits
    assert set(model.state_dict()) == names
    assert not list(model.buffers())
    model(tokens).logits.sum().backward()  # tables made in inference mode would be refused here
    # Few tokens without gradient are multiplied in another order.
    torch.testing.assert_close(copy.deepcopy(model)(tokens).logits, expected)
    assert model.to("meta")(tokens.to("meta")).logits.device.type == "meta"


def test_compiled_and_traced_models_leave_no_tables_behind():
    torch.manual_seed(0)
    model = Decoder(10, 8, 2, [MLP(8, 8)])
    tokens = torch.randint(0, 10, (1, 6))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(tokens))
    expected = model(tokens).logits
    exported = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(exported(tokens).logits, expected)
