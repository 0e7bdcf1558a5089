"""SoftMoELayer: numbers worked by hand, the leak, padding, and the slow layer in output and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.soft import SoftMoELayer
from tests.oracle import soft as oracle
from tests.parts.harness import repeatable

X = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
A = [[math.log(4), 0.0], [0.0, math.log(4)], [0.0, 0.0]]


def example(monkeypatch: pytest.MonkeyPatch) -> SoftMoELayer:
    """Return two experts f0(z) = 2 z and f1(z) = -z (z of 0 or more), one slot each, with the logits A."""
    layer = SoftMoELayer(2, 2, 1, 2, "relu", normalised=False).double()
    with torch.no_grad():
        layer.experts.w_in.copy_(torch.eye(2).expand(2, 2, 2))
        layer.experts.w_down.copy_(torch.stack([2 * torch.eye(2), -torch.eye(2)]))
    monkeypatch.setattr(layer, "logits", lambda x: x.new_tensor(A).expand(*x.shape[:-1], 2))
    return layer


def tokens(rows: list[list[float]]) -> Tensor:
    """Return fp64 tokens [S, D]."""
    return torch.tensor(rows, dtype=torch.float64)


def test_two_slots_by_hand(monkeypatch):
    # Columns of exp(A) are (4, 1, 1) and (1, 4, 1): slots (5/6, 2/6) and (2/6, 5/6). Outputs (10, 4) / 6 and
    # (-2, -5) / 6. Rows mix them by (.8, .2), (.2, .8), (.5, .5).
    y, stats = example(monkeypatch)(tokens(X))
    expected = [[1.2667, 0.3667], [0.0667, -0.5333], [0.6667, -0.0833]]
    torch.testing.assert_close(y, tokens(expected), rtol=0, atol=5e-5)
    assert len(stats) == 0


def test_a_later_token_changes_an_earlier_one(monkeypatch):
    # With (3, 1) in the third place slot 0 is (7/6, 2/6): y_1 = .8 (14, 4) / 6 + .2 (-4, -5) / 6.
    y, _ = example(monkeypatch)(tokens([*X[:2], [3.0, 1.0]]))
    assert y[0].tolist() == pytest.approx([1.7333, 0.3667], abs=5e-5)


def test_padding_enters_no_slot_and_gets_zero(monkeypatch):
    layer = example(monkeypatch)
    mask = torch.tensor([True, True, False])
    y, _ = layer(tokens([*X[:2], [math.nan, 7.0]]), mask)
    # Columns (4, 1) / 5 and (1, 4) / 5: slots (.8, .2), (.2, .8); outputs (1.6, .4), (-.2, -.8).
    expected = [
        [0.8 * 1.6 - 0.2 * 0.2, 0.8 * 0.4 - 0.2 * 0.8],
        [0.2 * 1.6 - 0.8 * 0.2, 0.2 * 0.4 - 0.8 * 0.8],
    ]
    torch.testing.assert_close(y, tokens([*expected, [0.0, 0.0]]), rtol=1e-12, atol=1e-12)
    nobody, _ = layer(tokens(X), torch.zeros(3, dtype=torch.bool))
    assert not nobody.any()


def test_normalised_logits_by_hand():
    # l2norm((3, 4)) = (.6, .8); columns (0, 2) -> (0, 1), (5, 0) -> (1, 0), times the scale of 2: 1.6, 1.2.
    layer = SoftMoELayer(2, 2, 1, 3).double()
    with torch.no_grad():
        layer.phi.copy_(torch.tensor([[0.0, 5.0], [2.0, 0.0]]))
        assert layer.scale.item() == 1
        layer.scale.fill_(2.0)
    assert layer.logits(tokens([[3.0, 4.0]])).tolist()[0] == pytest.approx([1.6, 1.2], abs=1e-6)
    assert layer.logits(tokens([[30.0, 40.0]])).tolist()[0] == pytest.approx([1.6, 1.2], abs=1e-6)
    # A token of zeros has no direction: logits 0, and a finite gradient.
    zero = tokens([[0.0, 0.0]]).requires_grad_()
    layer.logits(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_sequences_do_not_see_each_other():
    layer = SoftMoELayer(4, 3, 2, 5)
    x = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    y, _ = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[1, 2], layer(x[1, 2])[0])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 4)])
def test_nothing_and_one_token_are_no_special_case(shape):
    layer = SoftMoELayer(4, 3, 1, 5)
    x = torch.ones(shape, requires_grad=True)
    y, _ = layer(x, torch.ones(shape[:-1], dtype=torch.bool))
    y.sum().backward()
    assert y.shape == shape
    assert torch.isfinite(layer.phi.grad).all()


@repeatable(200)
@given(st.data())
def test_it_is_the_slow_layer_in_output_and_all_gradients(data: st.DataObject):
    batch, length, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    num_experts, slots, hidden = (data.draw(st.integers(1, 3)) for _ in range(3))
    activation = data.draw(st.sampled_from(("relu", "gelu", "swiglu")))
    normalised, masked = data.draw(st.booleans()), data.draw(st.booleans())
    backend = data.draw(st.sampled_from((None, "reference")))
    seed = data.draw(st.integers(0, 10_000))
    torch.manual_seed(seed)
    layer = SoftMoELayer(
        width, num_experts, slots, hidden, activation, normalised=normalised, backend=backend
    ).double()
    x = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(batch, length) < 0.7 if masked else None
    direction = torch.randn_like(x)
    y, _ = layer(x, mask)
    given_leaves = [x, layer.phi, *([layer.scale] if normalised else []), *layer.experts.parameters()]
    found = torch.autograd.grad((y * direction).sum(), given_leaves)

    slow = [leaf.detach().clone().requires_grad_() for leaf in given_leaves]
    sx, phi, *rest = slow
    scale = rest.pop(0) if normalised else None
    w_in, w_down = rest
    real = [[True] * length] * batch if mask is None else mask.tolist()
    rows = [oracle.soft_moe(sx[b], phi, scale, w_in, w_down, activation, real[b]) for b in range(batch)]
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    loss = (expected * direction).sum() + sum(0 * leaf.sum() for leaf in slow)
    for mine, other in zip(found, torch.autograd.grad(loss, slow), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_autocast_computes_logits_and_mixtures_in_fp32():
    torch.manual_seed(0)
    layer = SoftMoELayer(8, 2, 2, 16)
    x = torch.randn(2, 5, 8)
    plain, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.logits(x).dtype == torch.float32
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 0, 1, 3), "num_experts 0, .*allowed: 1 or more of each"),
        ((4, 2, 0, 3), "slots_per_expert 0, .*allowed: 1 or more of each"),
    ],
)
def test_sizes_that_no_layer_has_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        SoftMoELayer(*sizes)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(
        UserError, match=r"mask torch.bool \(3,\) for x \(2, 3, 4\); allowed: torch.bool \(2, 3\)"
    ):
        SoftMoELayer(4, 2, 1, 3)(torch.ones(2, 3, 4), torch.ones(3, dtype=torch.bool))
