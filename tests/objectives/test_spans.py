"""Span corruption: an example by hand, T5's own lengths, and texts that come back whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.objectives import NextToken, SpanCorruption, Spans
from tests.parts.harness import repeatable


def test_an_example_by_hand():
    # "thank you for inviting me to your party last week" as 0..9; "for inviting" and "last" are masked.
    spans = Spans(10, first_sentinel=100, end=99, density=0.3, mean_length=1.5)
    assert (spans.num_masked, spans.num_spans) == (3, 2)
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, [2, 3, 8]] = True
    pair = spans.corrupt(torch.arange(10)[None], mask)
    assert pair.source.tolist() == [[0, 1, 100, 4, 5, 6, 7, 101, 9, 99]]
    assert pair.labels.tolist() == [[100, 2, 3, 101, 8, 99]]
    assert pair.target.tolist() == [[99, 100, 2, 3, 101, 8]]
    assert spans.restore(pair.source[0], pair.labels[0]).tolist() == list(range(10))


def test_t5_reads_512_and_writes_114():
    # 568 tokens: 15 % are 85.2, in 85 / 3 = 28.3 runs; 568 - 85 + 28 + 1 = 512 and 85 + 28 + 1 = 114.
    spans = Spans(568, 0, 0)
    assert (spans.num_masked, spans.num_spans) == (85, 28)
    assert (spans.source_length, spans.target_length) == (512, 114)


@repeatable(200)
@given(
    length=st.integers(2, 60),
    density=st.sampled_from((0.01, 0.15, 0.5, 0.9)),
    mean_length=st.sampled_from((1.0, 3.0, 10.0)),
    rows=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
def test_source_and_labels_together_are_the_text(
    length: int, density: float, mean_length: float, rows: int, seed: int
):
    spans = Spans(length, first_sentinel=50, end=7, density=density, mean_length=mean_length)
    draw = torch.Generator().manual_seed(seed)
    # Any id below the sentinels, the end id itself too.
    tokens = torch.randint(0, 50, (rows, length), generator=draw)
    objective = SpanCorruption(spans=spans)
    pair = objective.pair(tokens, torch.tensor(seed))
    assert pair.source.shape == (rows, spans.source_length)
    assert pair.target.shape == pair.labels.shape == (rows, spans.target_length)
    assert torch.equal(pair.target[:, 1:], pair.labels[:, :-1])
    mask = spans.mask(torch.tensor(seed), rows)
    assert mask.sum(dim=1).tolist() == [spans.num_masked] * rows
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    assert starts.sum(dim=1).tolist() == [spans.num_spans] * rows
    assert not mask[:, 0].any()
    assert mask[:, -1].all()
    for row in range(rows):
        assert torch.equal(spans.restore(pair.source[row], pair.labels[row]), tokens[row])


def test_masks_are_drawn_evenly_and_by_the_key():
    spans = Spans(40, 50, 50)
    mask = spans.mask(torch.tensor(3), 2000)
    assert torch.equal(mask, spans.mask(torch.tensor(3), 2000))
    # A row depends on the key and its number, not on how many there are.
    assert torch.equal(mask[:5], spans.mask(torch.tensor(3), 5))
    assert not torch.equal(mask, spans.mask(torch.tensor(4), 2000))
    # 6 of 40 in 2 runs: lengths 1 to 5 each with 1/5; four standard deviations of 2000 draws are .036.
    first = torch.stack([row.int().argmax() for row in mask])
    runs = torch.stack([(~row[i:]).int().argmax() for row, i in zip(mask, first.tolist(), strict=True)])
    shares = torch.bincount(runs, minlength=6)[1:6] / 2000
    assert float((shares - 0.2).abs().max()) < 0.036


def test_the_loss_is_that_of_next_token():
    assert SpanCorruption(balance_weight=0.5).balance_weight == NextToken(balance_weight=0.5).balance_weight
    with pytest.raises(UserError, match="balance_weight -1"):
        SpanCorruption(balance_weight=-1)


def test_what_cannot_be_is_refused_in_one_line():
    for density in (0.0, 1.0):
        with pytest.raises(UserError, match=f"span density {density}, mean length 3.0; allowed: above 0"):
            Spans(10, 0, 0, density=density)
    with pytest.raises(UserError, match=r"mean length 0\.5"):
        Spans(10, 0, 0, mean_length=0.5)
    with pytest.raises(UserError, match="1 tokens to mask spans of; allowed: 2 or more"):
        Spans(1, 0, 0)
