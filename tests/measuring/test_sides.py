"""All sides of a row compute the same thing."""

from __future__ import annotations

import pytest
import torch

from gatewright.measuring.grid import DTYPES, Cell, Shape, dense_width
from gatewright.measuring.rivals import switch_balance, too_large
from gatewright.measuring.sides import (
    DENSE,
    FEW,
    LINEAR,
    OURS,
    TRANSFORMERS,
    Side,
    build_sides,
)
from tests.measuring.samples import TINY

SPARSE = (OURS, *TRANSFORMERS)
ONE_CHOICE = TINY._replace(num_selected=1)


def make(shape: Shape, dtype="fp32", kind="forward-backward", names=(*SPARSE, *DENSE)) -> dict[str, Side]:
    torch.manual_seed(0)
    return build_sides(Cell(shape, dtype, kind, None), None, names)


def inputs(shape: Shape, dtype: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    x, grad = torch.randn(2, shape.tokens, shape.width).to(DTYPES[dtype])
    return x.clone().requires_grad_(), grad


@pytest.mark.parametrize("shape", [TINY, ONE_CHOICE, TINY._replace(num_experts=16, num_selected=5)])
def test_sparse_sides_give_the_same_output_and_gradients(shape: Shape):
    sides, found = make(shape, names=SPARSE), {}
    x, grad = inputs(shape)
    for name, side in sides.items():
        call, clear = side.turn(x, grad, "forward-backward", keep_gradients=False)
        call()
        leaves = (x, *side.parameters)
        assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in (x, *sides[OURS].parameters)]
        assert all(leaf.grad.abs().sum() > 0 for leaf in leaves), name
        found[name] = [side.layer(x)[0].detach(), *(leaf.grad.clone() for leaf in leaves)]
        clear()
    for name in TRANSFORMERS:
        for theirs, ours in zip(found[name], found[OURS], strict=True):
            torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("shape", [TINY, ONE_CHOICE])
def test_in_bf16_tokens_with_the_same_experts_have_the_same_output(shape: Shape):
    sides = make(shape, "bf16", names=SPARSE)
    x, _ = inputs(shape, "bf16")
    with torch.no_grad():
        found = {name: side.layer(x) for name, side in sides.items()}
    theirs = found[TRANSFORMERS[0]][1][1]
    # Ours routes in fp32, Mixtral's router in bf16: near a tie they may choose differently.
    wide = torch.nn.functional.linear(x.float(), sides[OURS].parameters[0].float())
    same = (wide.topk(shape.num_selected).indices.sort().values == theirs.sort().values).all(dim=1)
    assert same.float().mean() > 0.8
    for name in TRANSFORMERS:
        y, ours = found[name][0].float()[same], found[OURS][0].float()[same]
        assert found[name][0].dtype == torch.bfloat16
        assert (y - ours).norm() / ours.norm() < 0.02, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_dense_sides_are_one_layer(dtype: str):
    sides, found = make(TINY, dtype, names=DENSE), {}
    x, grad = inputs(TINY, dtype)
    for name, side in sides.items():
        call, clear = side.turn(x, grad, "forward-backward", keep_gradients=False)
        call()
        found[name] = [
            side.layer(x)[0].detach(),
            x.grad,
            *(weight.grad.squeeze(0) for weight in side.parameters),
        ]
        clear()
    assert found[LINEAR][2].shape == (2 * dense_width(TINY), TINY.width)
    for name in DENSE[1:]:
        for plain, ours in zip(found[LINEAR], found[name], strict=True):
            assert (plain - ours).norm() / plain.norm() < (1e-5 if dtype == "fp32" else 0.02)


def test_with_one_expert_the_dense_sides_are_the_sparse_ones():
    shape = Shape(tokens=24, width=16, expert_width=8, num_experts=1, num_selected=1)
    assert dense_width(shape) == shape.expert_width
    sides = make(shape)
    x, _ = inputs(shape)
    with torch.no_grad():
        for name in DENSE:
            for weight, source in zip(sides[name].parameters, sides[OURS].parameters[1:], strict=True):
                weight.copy_(source.view_as(weight))
        outputs = {name: side.layer(x)[0] for name, side in sides.items()}
    for name in sides:
        torch.testing.assert_close(outputs[name], outputs[LINEAR])


@pytest.mark.parametrize("shape", [TINY, ONE_CHOICE])
def test_the_balance_loss_of_transformers_sides_has_our_gradient(shape: Shape):
    sides = make(shape, names=SPARSE)
    x, _ = inputs(shape)
    values, grads = {}, {}
    for name, side in sides.items():
        _, seen = side.layer(x)
        assert side.loss is not None
        values[name] = side.loss(seen)
        grads[name] = torch.autograd.grad(values[name], [x, side.parameters[0]])
        assert grads[name][1].abs().sum() > 0
    for name in TRANSFORMERS:
        torch.testing.assert_close(values[name], values[OURS])
        torch.testing.assert_close(grads[name], grads[OURS], rtol=1e-4, atol=1e-7)


def test_the_balance_loss_by_hand():
    # Two tokens, three experts, both choose expert 0: f = (1, 0, 0), P = (0.6, 0.3, 0.1), loss 3 x 0.6.
    probabilities = torch.tensor([[0.5, 0.4, 0.1], [0.7, 0.2, 0.1]])
    assert switch_balance((probabilities, torch.tensor([[0], [0]]))).item() == pytest.approx(1.8)
    assert switch_balance((torch.full((2, 2), 0.5), torch.tensor([[0], [1]]))).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", [OURS, TRANSFORMERS[1], *DENSE])
def test_gradients_are_given_up_or_set_to_zero_and_never_summed(name: str):
    x, grad = inputs(TINY)
    for keep in (False, True):
        side = make(TINY, names=[name])[name]
        call, clear = side.turn(x, grad, "forward-backward", keep_gradients=keep)
        call()
        first = [leaf.grad.clone() for leaf in (x, *side.parameters)]
        places = [leaf.grad.data_ptr() for leaf in side.parameters]
        clear()
        if not keep:
            assert all(leaf.grad is None for leaf in (x, *side.parameters))
        call()
        for before, leaf in zip(first, (x, *side.parameters), strict=True):
            torch.testing.assert_close(leaf.grad, before)
        if keep:
            assert [leaf.grad.data_ptr() for leaf in side.parameters] == places
        x.grad = None


@pytest.mark.parametrize("name", [OURS, LINEAR])
def test_forward_alone_records_nothing(name: str, monkeypatch):
    side = make(TINY, names=[name])[name]
    x, grad = inputs(TINY)
    seen = []
    layer = side.layer
    object.__setattr__(side, "layer", lambda given: seen.append(layer(given)))
    side.turn(x, grad, "forward", keep_gradients=False).call()
    assert not seen[0][0].requires_grad
    assert x.grad is None


def test_the_side_with_fewest_experts_is_ours_at_that_size():
    few = TINY._replace(num_experts=2)
    sides = build_sides(Cell(TINY, "fp32", "forward", few), None, [OURS, FEW])
    assert [sides[name].parameters[0].shape[0] for name in (OURS, FEW)] == [4, 2]


def test_batched_mm_is_left_out_where_it_copies_too_much():
    large = Shape(16384, 128, 256, 64, 2)
    assert "copies 12.0 GiB" in (too_large("batched_mm", large, "fp32") or "")
    assert too_large("batched_mm", Shape(4096, 64, 128, 64, 1), "fp32") is None
    assert too_large("grouped_mm", large, "fp32") is None
