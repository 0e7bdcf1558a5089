"""Every loss against the slow oracle, values and gradients, on random routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.parts import Stats, balance_loss
from gatewright.parts.losses import LOSSES
from tests.oracle import balancing as oracle
from tests.parts.harness import repeatable
from tests.parts.seen import softmax, stats_of, with_sums

TAU = 0.3


@dataclass(frozen=True)
class Case:
    """E experts on D devices (E = D x size), K of them per token, and T tokens in groups of `group`."""

    num_tokens: int
    num_devices: int
    size: int
    num_selected: int
    group: int | None
    mask: tuple[bool, ...] | None
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a small case; the last group is mostly short, and some hold padding only."""
    num_tokens, num_devices, size = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return Case(
        num_tokens,
        num_devices,
        size,
        draw(st.integers(1, num_devices * size)),
        draw(st.none() | st.integers(1, 4)),
        draw(st.none() | st.tuples(*[st.booleans()] * num_tokens)),
        draw(st.integers(0, 10_000)),
    )


def look(case: Case, logits: Tensor) -> tuple[Stats, oracle.Seen]:
    """Return the library's Stats, with the sums that single rules keep, and the oracle's view."""
    mask = None if case.mask is None else torch.tensor(case.mask, dtype=torch.bool)
    stats = stats_of(logits, case.num_selected, group_size=case.group, mask=mask)
    seen = oracle.see(logits, case.num_selected, None if case.mask is None else list(case.mask), case.group)
    real = logits if mask is None else logits[mask]
    p = softmax(real)
    sums = {
        "entropy": -(p * p.log()).sum(),
        "cosine_importance": softmax(real / TAU).sum(dim=0),
        "device_counts": torch.tensor(oracle.device_counts(seen, case.num_devices)),
    }
    return with_sums(stats, **sums), seen


def expected(name: str, seen: oracle.Seen, case: Case) -> Tensor:
    """Return the oracle's loss of that name."""
    if name == "cosine":
        return oracle.cosine(seen, TAU)
    if name == "device":
        return oracle.device(seen, case.num_devices)
    if name == "communication":
        return oracle.communication(seen, case.num_devices, case.num_devices)
    return getattr(oracle, name)(seen)


def found(name: str, stats: Stats, case: Case) -> Tensor:
    """Return ours."""
    options = {"device": 1, "communication": 2}.get(name, 0)
    return LOSSES[name](stats, *[case.num_devices] * options)


COMPARED = (
    *("balance", "sequence_balance", "gshard", "z", "importance", "load", "device", "communication"),
    *("entropy", "cosine"),
)


@given(cases())
@repeatable(200)
def test_every_loss_is_the_oracles(case: Case):
    draw = torch.Generator().manual_seed(case.seed)
    num_experts = case.num_devices * case.size
    logits = torch.randn(case.num_tokens, num_experts, dtype=torch.float64, generator=draw)
    logits.requires_grad_()
    stats, seen = look(case, logits)
    ours = {name: found(name, stats, case) for name in COMPARED}
    theirs = {name: expected(name, seen, case) for name in COMPARED}
    # f from elsewhere: counts that no token here made.
    counts = torch.randint(0, 9, (num_experts,), generator=draw)
    ours["global batch"] = balance_loss(stats, "global_batch", {"router": counts})
    theirs["global batch"] = oracle.balance(seen, counts.tolist())
    for name, value in ours.items():
        assert abs(value.item() - theirs[name].item()) <= 1e-12 * max(1, theirs[name].item()), name
    # One gradient of a random sum tells all of them: none can hide behind another.
    weights = torch.rand(len(ours), dtype=torch.float64, generator=draw) + 0.5
    grads = [
        torch.autograd.grad((weights * torch.stack(list(side.values()))).sum() + 0 * logits.sum(), logits)[0]
        for side in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_no_loss_is_left_out():
    # The others are a plain mean of a sum over tokens: see test_losses_of_rules.
    assert set(LOSSES) - set(COMPARED) == {"threshold", "depth", "relu"}
