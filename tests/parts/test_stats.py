"""Stats: every field worked by hand, dtypes, capture, and merging."""

from __future__ import annotations

import math

import pytest
import torch

from gatewright.parts import MoELayer, RouterStats, Stats
from tests.parts.harness import seen_layer

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
# exp of these logits: (4, 2, 1), (4, 1, 2), (4, 2, 1), (1, 2, 4). K = 2 chooses 0 1 | 0 2 | 0 1 | 2 1.
LOGITS = torch.tensor(
    [[LN4, LN2, 0.0], [LN4, 0.0, LN2], [LN4, LN2, 0.0], [0.0, LN2, LN4]], dtype=torch.float64
)


def record_of(layer: MoELayer, x: torch.Tensor, **options: object) -> RouterStats:
    """Return the layer's only record."""
    stats = layer(x, **options)[1]
    assert list(stats) == ["router"]
    return stats["router"]


def test_dropless_by_hand():
    record = record_of(seen_layer(3, 2), LOGITS)
    assert (record.num_selected, record.num_experts, record.tokens.item()) == (2, 3, 4)
    assert record.counts.tolist() == [3, 3, 2]
    assert record.kept.tolist() == [3, 3, 2]
    assert record.dropped_by_rank.tolist() == [0, 0]
    assert record.unrouted.item() == record.nonfinite.item() == 0
    assert record.score_sums.tolist() == pytest.approx([13 / 7, 7 / 7, 8 / 7])
    assert record.logsumexp_sum.item() == pytest.approx(4 * math.log(7))
    assert record.logsumexp_square_sum.item() == pytest.approx(4 * math.log(7) ** 2)


def test_dropped_by_hand():
    # C = ceil(0.5 * 2 * 4 / 3) = 2. In position order 0 1 | 0 2 | 0 1 | 2 1 the third 0 (token 2, rank 0)
    # and the third 1 (token 3, rank 1) find no place.
    record = record_of(seen_layer(3, 2, capacity_factor=0.5), LOGITS, capture=True)
    assert record.counts.tolist() == [3, 3, 2]
    assert record.kept.tolist() == [2, 2, 2]
    assert record.dropped_by_rank.tolist() == [1, 1]
    assert record.unrouted.item() == 0
    assert record.experts is not None
    assert record.experts.tolist() == [[0, 1], [0, 2], [-1, 1], [2, -1]]


def test_unrouted_by_hand():
    # K = 1, all four want expert 0, C = ceil(0.5 * 4 / 2) = 1: three tokens are left without any expert.
    record = record_of(
        seen_layer(2, 1, weights="raw", capacity_factor=0.5), torch.tensor([[1.0, 0.0]] * 4).double()
    )
    assert record.unrouted.item() == 3
    assert record.dropped_by_rank.tolist() == [3]
    assert record.counts.tolist() == [4, 0]
    assert record.kept.tolist() == [1, 0]


def test_padding_enters_no_statistic():
    layer = seen_layer(3, 2, capacity_factor=0.5)
    mask = torch.tensor([True, False, True, True, False, True])
    padded = torch.full((6, 3), math.nan, dtype=torch.float64)
    padded[mask] = LOGITS
    with_padding, without = record_of(layer, padded, mask=mask), record_of(layer, LOGITS)
    for name in (
        *("tokens", "counts", "kept", "dropped_by_rank", "unrouted", "nonfinite"),
        *("score_sums", "logsumexp_sum", "logsumexp_square_sum"),
    ):
        assert torch.equal(getattr(with_padding, name), getattr(without, name)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_counts_are_int64_without_gradient_and_sums_wide_with_it(dtype: torch.dtype):
    torch.manual_seed(0)
    for factor in (None, 0.5):
        layer = MoELayer(4, 3, 2, 5, capacity_factor=factor).to(dtype)
        record = record_of(layer, torch.randn(6, 4).to(dtype))
        for name in ("tokens", "counts", "kept", "dropped_by_rank", "unrouted", "nonfinite"):
            assert getattr(record, name).dtype == torch.int64, name
        for name in ("score_sums", "logsumexp_sum", "logsumexp_square_sum"):
            value = getattr(record, name)
            assert value.dtype == torch.promote_types(dtype, torch.float32), name
            assert value.requires_grad, name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_logits_are_counted(bad: float):
    # A lone -inf leaves logsumexp finite; it counts all the same.
    logits = LOGITS.clone()
    logits[1, 2] = bad
    layer = seen_layer(3, 2)
    with torch.no_grad():
        layer.router.forward = lambda x: x  # type: ignore[method-assign]
    assert record_of(layer, logits).nonfinite.item() == 1
    logits[3] = bad
    assert record_of(layer, logits).nonfinite.item() == 2


def test_without_capture_nothing_of_size_t_is_kept():
    record = record_of(seen_layer(3, 2), LOGITS)
    assert record.logits is record.scores is record.experts is record.combine_weights is None


def test_capture_hands_out_what_was_decided():
    layer = seen_layer(3, 2)
    mask = torch.tensor([[True, True], [False, True]])
    record = record_of(layer, LOGITS.view(2, 2, 3).requires_grad_(), mask=mask, capture=True)
    captured = (record.logits, record.scores, record.experts, record.combine_weights)
    assert all(value is not None and not value.requires_grad for value in captured)
    assert record.logits is not None
    assert record.scores is not None
    assert record.combine_weights is not None
    assert record.experts is not None
    real = mask.flatten()
    assert torch.equal(record.logits[real], LOGITS[real])
    assert record.scores[0].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert record.experts.tolist() == [[0, 1], [0, 2], [-1, -1], [2, 1]]
    assert record.combine_weights[3].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert [tuple(value.shape) for value in captured if value is not None] == [(4, 3), (4, 3), (4, 2), (4, 2)]


def test_capture_changes_nothing_else():
    layer = seen_layer(3, 2, capacity_factor=0.5)
    (y, plain), (y_captured, captured) = layer(LOGITS), layer(LOGITS, capture=True)
    assert torch.equal(y, y_captured)
    assert torch.equal(plain["router"].score_sums, captured["router"].score_sums)


def test_a_forward_leaves_the_layer_as_it_was():
    layer = seen_layer(3, 2)
    before = dict(vars(layer)), {name: value.clone() for name, value in layer.state_dict().items()}
    layer(LOGITS, capture=True)
    assert vars(layer) == before[0]
    assert list(layer.state_dict()) == list(before[1])
    assert all(torch.equal(value, before[1][name]) for name, value in layer.state_dict().items())


def test_stats_is_a_read_only_mapping():
    stats = seen_layer(3, 2)(LOGITS)[1].under("layers.3")
    assert list(stats) == ["layers.3.router"]
    assert len(stats) == 1
    assert "layers.3.router" in stats
    assert repr(stats) == "Stats(layers.3.router)"
    with pytest.raises(TypeError):
        stats["layers.3.router"] = None  # type: ignore[index]
    with pytest.raises(KeyError):
        stats["router"]


def test_merging_keeps_both_and_leaves_the_parts():
    stats = seen_layer(3, 2)(LOGITS)[1]
    first, second = stats.under("layers.0"), stats.under("layers.1")
    merged = first | second
    assert list(merged) == ["layers.0.router", "layers.1.router"]
    assert merged["layers.1.router"] is stats["router"]
    assert len(first) == len(second) == 1
    assert list(Stats() | first) == list(first)


def test_merging_a_name_twice_is_refused():
    stats = seen_layer(3, 2)(LOGITS)[1]
    with pytest.raises(ValueError, match=r"router names \['router'\] stand in both Stats; .*\.under\(\)"):
        stats | stats
