"""A rule's assignment against a slow one, token by token: experts by rank, weights, sums and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from gatewright.parts import Assignment, RoutingCall

# One token's experts in falling rank, and their weights as 0-d tensors.
Choice = tuple[list[int], list[Tensor]]
TOLERANCE = 1e-12


@st.composite
def routed_tokens(draw: st.DrawFn, least_experts: int = 1) -> tuple[Tensor, Tensor | None]:
    """Draw fp64 logits [T, E], with ties in one case of three, and a mask [T] or none."""
    num_tokens, num_experts = draw(st.integers(0, 6)), draw(st.integers(least_experts, 7))
    source = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = 2 * torch.randn(num_tokens, num_experts, generator=source, dtype=torch.float64)
    if draw(st.integers(0, 2)) == 0:
        logits = logits.round()
    mask = torch.rand(num_tokens, generator=source) < 0.7 if draw(st.booleans()) else None
    return logits, mask


def call_of(mask: Tensor | None = None, training: bool = True, key: int = 0) -> RoutingCall:
    """Return a call with a key, in training unless told."""
    return RoutingCall(mask=mask, training=training, key=torch.tensor(key))


def assert_same(
    found: Assignment,
    expected: Sequence[Choice],
    pairs: Sequence[tuple[Tensor, Tensor]],
    sums: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Fail unless both choose the same, weigh the same and hand the same gradients to each leaf.

    Args: `expected` per token; `pairs` (our leaf, the oracle's leaf); `sums` (ours, the oracle's), tensors of
    the same shape.
    """
    assert found.num_tokens == len(expected)
    ours = [tensor.sum() * 0 for tensor, _ in pairs]
    theirs = [tensor.sum() * 0 for _, tensor in pairs]
    for t, (ids, weights) in enumerate(expected):
        places = found.experts[t] >= 0
        assert found.experts[t][places].tolist() == ids, f"token {t}"
        for place, weight in zip(places.nonzero().flatten().tolist(), weights, strict=True):
            assert abs(found.weights[t, place].item() - weight.item()) <= TOLERANCE, f"token {t}, {place}"
            # Uneven factors, so that no two weights can stand in for each other.
            factor = 1 + t + 0.37 * place
            ours.append(factor * found.weights[t, place])
            theirs.append(factor * weight)
    for mine, other in sums:
        torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE)
        factors = torch.linspace(0.5, 1.5, mine.numel(), dtype=mine.dtype)
        ours.append((factors * mine.flatten()).sum())
        theirs.append((factors * other.flatten()).sum())
    gradients = torch.autograd.grad(torch.stack(ours).sum(), [mine for mine, _ in pairs])
    wanted = torch.autograd.grad(torch.stack(theirs).sum(), [other for _, other in pairs])
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE)


def leaves(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same numbers twice, as leaves with gradient."""
    return logits.clone().requires_grad_(), logits.clone().requires_grad_()
