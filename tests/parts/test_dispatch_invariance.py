"""What must not change: how whole groups are split over calls, their order, the labels of the experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gatewright.kernels import DispatchPlan
from gatewright.parts import Capacity, MoELayer, RouterStats
from gatewright.parts.capacity import ORDERS
from tests.parts.harness import repeatable


class Scaling(nn.Module):
    """Experts of which expert e gives (e + 1) x, element by element: no sum whose order could matter."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, x: Tensor, plan: DispatchPlan, weights: Tensor, backend: str | None) -> Tensor:
        """Return y [T, D]."""
        num_rows = int(plan.counts.sum())
        label = torch.repeat_interleave(self.labels, plan.counts)
        rows = x[plan.token_ids[:num_rows]] * label.unsqueeze(-1)
        rows = torch.cat([rows, torch.zeros_like(x[:1])])
        return (rows[plan.slots] * weights.unsqueeze(-1)).sum(dim=1)


def layer_of(
    num_experts: int, num_selected: int, labels: Tensor | None = None, **options: object
) -> MoELayer:
    """Return a layer whose logits are its input's columns, in the order of `labels`."""
    labels = torch.arange(num_experts) if labels is None else labels
    layer = MoELayer(
        num_experts, num_experts, num_selected, 3, experts=Scaling(labels + 1.0), weights="raw", **options
    )
    layer = layer.double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(num_experts)[labels])
    return layer


@dataclass(frozen=True)
class Batch:
    """A batch of whole groups, the last one maybe smaller, and the layer's options."""

    x: Tensor
    mask: Tensor | None
    num_selected: int
    group_size: int
    capacity: Capacity

    def run(self, tokens: Tensor, labels: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """Return (y, record) of these tokens, as one call."""
        options = {"group_size": self.group_size, "capacity": self.capacity}
        layer = layer_of(self.x.shape[1], self.num_selected, labels, **options)
        y, stats = layer(self.x[tokens], None if self.mask is None else self.mask[tokens], capture=True)
        return y, stats["router"]


@st.composite
def batches(draw: st.DrawFn, even: bool = False) -> Batch:
    """Draw a batch; with `even` the last group is full."""
    num_experts = draw(st.integers(1, 5))
    num_selected, size = draw(st.integers(1, num_experts)), draw(st.integers(1, 5))
    num_tokens = size * draw(st.integers(1, 4)) - (0 if even else draw(st.integers(0, size - 1)))
    dice = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    x = torch.randn(num_tokens, num_experts, generator=dice, dtype=torch.float64)
    x[:, 0] += draw(st.sampled_from((0.0, 2.0)))
    mask = torch.rand(num_tokens, generator=dice) < 0.7 if draw(st.booleans()) else None
    capacity = Capacity(
        draw(st.sampled_from((0.3, 0.7, 1.0, 1 / 3))),
        minimum=draw(st.integers(0, 1)),
        order=draw(st.sampled_from(ORDERS)),
        reroute=draw(st.booleans()),
    )
    return Batch(x, mask, num_selected, size, capacity)


OF_GROUPS = ("group_tokens", "group_counts", "group_first_counts", "group_score_sums")
OF_TOKENS = ("experts", "combine_weights")
SUMMED = ("tokens", "counts", "kept", "dropped_by_rank", "unrouted", "first_counts")


@repeatable(200)
@given(batch=batches(), data=st.data())
def test_calls_that_end_with_a_group_change_nothing(batch: Batch, data: st.DataObject):
    tokens = torch.arange(batch.x.shape[0])
    y, whole = batch.run(tokens)
    groups = tokens.split(batch.group_size)
    cut = data.draw(st.integers(0, len(groups)))
    calls = [torch.cat(part) for part in (groups[:cut], groups[cut:]) if part]
    parts = [batch.run(call) for call in calls]
    assert torch.equal(y, torch.cat([part for part, _ in parts]))
    for name in (*OF_GROUPS, *OF_TOKENS):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(record, name) for _, record in parts])), (
            name
        )
    for name in SUMMED:
        assert torch.equal(getattr(whole, name), sum(getattr(record, name) for _, record in parts)), name


@repeatable(200)
@given(batch=batches(even=True), data=st.data())
def test_groups_in_another_order_give_the_same_in_that_order(batch: Batch, data: st.DataObject):
    tokens = torch.arange(batch.x.shape[0])
    groups = tokens.split(batch.group_size)
    order = data.draw(st.permutations(range(len(groups))))
    moved = torch.cat([groups[g] for g in order])
    (y, whole), (y_moved, other) = batch.run(tokens), batch.run(moved)
    assert torch.equal(y[moved], y_moved)
    for name in OF_TOKENS:
        assert torch.equal(getattr(whole, name)[moved], getattr(other, name)), name
    for name in OF_GROUPS:
        assert torch.equal(getattr(whole, name)[torch.tensor(order)], getattr(other, name)), name
    for name in SUMMED:
        assert torch.equal(getattr(whole, name), getattr(other, name)), name


@repeatable(200)
@given(batch=batches(), data=st.data())
def test_other_labels_for_the_experts_change_only_labels(batch: Batch, data: st.DataObject):
    num_experts = batch.x.shape[1]
    labels = torch.tensor(data.draw(st.permutations(range(num_experts))))
    tokens = torch.arange(batch.x.shape[0])
    (y, whole), (y_named, other) = batch.run(tokens), batch.run(tokens, labels)
    torch.testing.assert_close(y, y_named, rtol=1e-13, atol=1e-15)
    assert whole.experts is not None
    assert other.experts is not None
    assert torch.equal(torch.where(other.experts < 0, -1, labels[other.experts]), whole.experts)
    for name in ("counts", "kept", "first_counts"):
        assert torch.equal(getattr(whole, name)[labels], getattr(other, name)), name
    assert torch.equal(whole.group_counts[:, labels], other.group_counts)
    for name in ("dropped_by_rank", "unrouted", "tokens"):
        assert torch.equal(getattr(whole, name), getattr(other, name)), name
