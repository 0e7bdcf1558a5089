"""Linear maps of the same tokens, joined: each is what it would be alone, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatewright.kernels import native
from gatewright.parts import draws
from gatewright.parts.maps import linear_maps

SIZES = [(1, 1, (1, 2)), (130, 33, (7, 16, 1)), (1000, 64, (64, 64, 8, 8)), (65, 5, (3, 130))]


def given(num_tokens: int, width: int, outputs: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    source = torch.Generator().manual_seed(width)
    x = torch.randn(num_tokens, width, generator=source)
    return x, [torch.randn(n, width, generator=source) for n in outputs]


def run(x: Tensor, weights: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the outputs, and the gradients of x and of every weight."""
    leaves = [one.clone().requires_grad_() for one in (x, *weights)]
    outs = linear_maps(leaves[0], leaves[1:], dtype)
    assert all(out.is_contiguous() for out in outs)
    return [*outs, *torch.autograd.grad(sum((out * out.cos()).sum() for out in outs), leaves)]


@pytest.mark.parametrize("natively", [True, False])
@pytest.mark.parametrize(("num_tokens", "width", "outputs"), SIZES)
def test_joined_maps_are_the_maps_alone(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, width: int, outputs: tuple[int, ...], natively: bool
):
    if natively and not native.is_ready():
        pytest.skip(native.status().reason)
    monkeypatch.setattr(draws, "_LEAST_CHUNKED", 0 if natively else 2**40)
    x, weights = given(num_tokens, width, outputs)
    found = run(x, weights)
    exact = [x.double().requires_grad_(), *(weight.double().requires_grad_() for weight in weights)]
    outs = [exact[0] @ weight.T for weight in exact[1:]]
    expected = [*outs, *torch.autograd.grad(sum((out * out.cos()).sum() for out in outs), exact)]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 2e-6 * width**0.5 * max(other.abs().max().item(), 1)


@pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
def test_bf16_tokens_are_mapped_as_they_are(monkeypatch: pytest.MonkeyPatch):
    # Every product and sum in fp32, as if the tokens had been widened first; only their gradient is narrowed.
    x, weights = given(130, 33, (7, 16))
    monkeypatch.setattr(draws, "_LEAST_CHUNKED", 0)
    narrow = x.bfloat16()
    found, expected = run(narrow, weights), run(narrow.float(), weights)
    assert found[2].dtype == torch.bfloat16
    assert torch.equal(found[2], expected[2].bfloat16())
    assert all(torch.equal(found[i], expected[i]) for i in (0, 1, 3, 4))


def test_tokens_without_gradient_get_none_and_weights_theirs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(draws, "_LEAST_CHUNKED", 0)
    x, weights = given(130, 33, (7, 16))
    leaves = [weight.requires_grad_() for weight in weights]
    first, _ = linear_maps(x, leaves, torch.float32)
    first.sum().backward()
    torch.testing.assert_close(leaves[0].grad, x.sum(dim=0).expand(7, -1))
    assert leaves[1].grad is None or not leaves[1].grad.any()
    assert x.grad is None


@pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(draws, "_LEAST_CHUNKED", 0)
    x, weights = given(3000, 64, (64, 64))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(x, weights))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for each in found for one, other in zip(each, found[0], strict=True))


@pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
def test_what_does_not_fit_is_refused():
    x, weights = given(130, 33, (7, 16))
    forward, backward = torch.ops.gatewright.maps_forward, torch.ops.gatewright.maps_backward
    only = "contiguous matrices of one width on the CPU, fp32 or, for x and what is multiplied in it, bf16"
    wrong = [
        (x, [weights[0][:, :5].contiguous()], False),
        (x, [weights[0], weights[1].T.contiguous().T], False),
        (x.double(), weights, False),
        (x, [weights[0], weights[1].bfloat16()], True),
        (x.bfloat16(), [weight.bfloat16() for weight in weights], False),
        (x, [], True),
    ]
    for given_wrongly in wrong:
        with pytest.raises(ValueError, match=only):
            forward(*given_wrongly)
    due = [torch.ones(130, 7), torch.ones(130, 16)]
    for gradients in (
        [due[0], due[0]],
        [due[0], due[1].bfloat16()],
        [due[0], torch.ones(16, 130).T],
    ):
        with pytest.raises(ValueError, match="gradient 1 does not fit"):
            backward(gradients, x, weights, False, True, True)
    with pytest.raises(ValueError, match="one gradient for each map"):
        backward(due[:1], x, weights, False, True, True)
