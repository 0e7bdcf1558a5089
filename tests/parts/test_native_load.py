"""The smooth load in C++: values and gradients of the slow form, whatever threads, ties and padding do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatewright.kernels import native
from gatewright.parts import draws
from gatewright.parts.noise import load_estimate, load_total
from gatewright.parts.routing import select_top

pytestmark = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)


def case(num_tokens: int, num_experts: int, ties: bool = False) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(num_experts)
    clean, noise, raw = (torch.randn(num_tokens, num_experts, generator=source) for _ in range(3))
    if ties:
        clean, noise = clean.mul(2).round(), torch.zeros_like(noise)
    # A few are below the least standard deviation.
    std = torch.nn.functional.softplus(raw) * (raw > -1.5)
    mask = torch.rand(num_tokens, generator=source) > 0.2
    return {"clean": clean, "noisy": clean + noise * std, "std": std, "mask": mask}


def run(
    given: dict[str, Tensor], num_selected: int, excluding: bool, one_std: bool, groups: int
) -> list[Tensor]:
    """Return the loads and all gradients of a weighted sum of them."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("clean", "noisy", "std")}
    chosen = select_top(given["noisy"], num_selected)
    std = 0.3 if one_std else leaves["std"]
    total = load_total(
        leaves["clean"], leaves["noisy"], std, num_selected, excluding, chosen, given["mask"], groups
    )
    weights = torch.arange(total.numel()).view(total.shape).cos()
    grads = torch.autograd.grad((total * weights).sum(), list(leaves.values()), allow_unused=True)
    return [total.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "num_selected", "excluding", "one_std", "groups"),
    [(64, 2, True, False, 1), (13, 4, True, False, 1), (8, 2, True, False, 5), (9, 1, False, True, 1)],
)
def test_it_is_the_slow_form(
    monkeypatch: pytest.MonkeyPatch,
    num_experts: int,
    num_selected: int,
    excluding: bool,
    one_std: bool,
    groups: int,
    ties: bool,
):
    given = case(1500, num_experts, ties)
    monkeypatch.setattr(draws, "_LEAST_CHUNKED", 0)
    settings = (num_selected, excluding, one_std, groups)
    found = run(given, *settings)
    monkeypatch.setattr(native, "is_ready", lambda: False)
    exact = run({name: v if v.dtype == torch.bool else v.double() for name, v in given.items()}, *settings)
    assert len(found) == len(exact) == (3 if one_std else 4)
    for one, other in zip(found, exact, strict=True):
        # Relative to the largest: a step over 1e-6 makes slopes of 1e5, and sums of 300 numbers.
        assert (one - other).abs().max() <= 1e-6 * max(other.abs().max().item(), 1)


def test_padding_may_hold_anything():
    given = case(600, 16)
    clean = run(given, 2, True, False, 1)
    for name in ("clean", "noisy", "std"):
        given[name][~given["mask"]] = torch.nan
    for one, other in zip(run(given, 2, True, False, 1), clean, strict=True):
        assert torch.equal(one, other)


def test_threads_change_no_bit():
    given, before, found = case(5000, 16), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(given, 2, True, False, 4))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for each in found for one, other in zip(each, found[0], strict=True))


def test_what_does_not_fit_is_refused():
    given = case(600, 16)
    chosen = select_top(given["noisy"], 2)
    rest = (given["clean"], given["noisy"], given["std"])
    with pytest.raises(ValueError, match="chosen experts are outside 0 to 15"):
        torch.ops.gatewright.load_forward(*rest, chosen + 15, None, True, 1)
    with pytest.raises(ValueError, match="shapes do not fit"):
        torch.ops.gatewright.load_forward(*rest, chosen[:5], None, True, 1)
    with pytest.raises(ValueError, match="contiguous fp32 tensors"):
        torch.ops.gatewright.load_forward(rest[0].double(), *rest[1:], chosen, None, True, 1)


def test_it_is_the_sum_of_what_every_token_has():
    given = case(600, 16)
    chosen = select_top(given["noisy"], 2)
    each = load_estimate(given["clean"], given["noisy"], given["std"], 2)
    total = load_total(given["clean"], given["noisy"], given["std"], 2, True, chosen, None)
    torch.testing.assert_close(total, each.sum(dim=0, keepdim=True))
