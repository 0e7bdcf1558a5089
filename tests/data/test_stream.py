"""The stream is a pure function of one integer: nothing repeats, nothing is skipped, batches stand alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.data import TokenStream
from gatewright.data.hashing import mix64, permutation, shingle_hashes
from gatewright.errors import UserError

SHAPES = {
    "length": st.integers(2, 400),
    "batch_size": st.integers(1, 40),
    "context": st.integers(1, 30),
    "seed": st.integers(0, 2**40),
}


def stream_over(length: int, batch_size: int, context: int, seed: int) -> TokenStream:
    # Token i has the value i, so a batch shows where it was read.
    return TokenStream(np.arange(length, dtype=np.uint16), batch_size, min(context, length - 1), seed)


@settings(max_examples=100, deadline=None)
@given(**SHAPES)
def test_each_epoch_visits_every_window_once(length, batch_size, context, seed):
    stream = stream_over(length, batch_size, context, seed)
    batches = -(-3 * stream.num_windows // batch_size)
    rows = np.concatenate([stream.batch(index) for index in range(batches)])
    assert rows.shape == (batches * batch_size, stream.context + 1)
    assert rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all(), "a window is not consecutive tokens"
    for epoch in range(3):
        part = rows[epoch * stream.num_windows : (epoch + 1) * stream.num_windows]
        targets = np.sort(part[:, 1:].ravel())
        assert (targets == np.arange(1, stream.num_windows * stream.context + 1)).all()
    assert stream.num_windows * stream.context < length <= (stream.num_windows + 1) * stream.context + 1


@settings(max_examples=100, deadline=None)
@given(**SHAPES, indices=st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_a_batch_depends_on_its_index_alone(length, batch_size, context, seed, indices):
    used = stream_over(length, batch_size, context, seed)
    for index in indices:
        fresh = stream_over(length, batch_size, context, seed)
        assert np.array_equal(used.batch(index), fresh.batch(index))
        assert used.epoch(index) == index * batch_size // used.num_windows


def test_epochs_and_seeds_give_other_orders():
    stream = TokenStream(np.arange(1001), 100, 10, seed=0)
    other = TokenStream(np.arange(1001), 100, 10, seed=1)
    assert not np.array_equal(stream.windows(0), stream.windows(1))
    assert not np.array_equal(stream.windows(0), other.windows(0))
    assert not np.array_equal(stream.windows(0), np.arange(100)), "the first epoch is not shuffled"


def test_a_batch_across_two_epochs_ends_one_and_begins_the_next():
    stream = TokenStream(np.arange(51), 4, 10, seed=3)
    first, second = stream.windows(0), stream.windows(1)
    assert set(first) | {second[0]} == set(range(5))
    assert (stream.epoch(0), stream.epoch(1), stream.epoch(2)) == (0, 0, 1)


def test_the_order_is_the_same_everywhere():
    # Fixed numbers: a changed hash would silently give every resumed run another order.
    assert permutation(8, 0, 0).tolist() == [0, 1, 6, 3, 5, 4, 2, 7]
    assert permutation(8, 0, 1).tolist() == [3, 0, 1, 5, 2, 7, 4, 6]


def test_mix64_gives_splitmix64():
    # The published first outputs of SplitMix64 from state 0: the state grows by the golden ratio each time.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma], dtype=np.uint64)
    assert [hex(int(value)) for value in mix64(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@given(data=st.binary(max_size=80), width=st.sampled_from([1, 2, 4, 16]))
def test_shingle_hashes_are_equal_where_the_bytes_are(data, width):
    hashes = shingle_hashes(np.frombuffer(data, dtype=np.uint8), width)
    shingles = [data[i : i + width] for i in range(len(data) - width + 1)]
    assert len(hashes) == len(shingles)
    table: dict[bytes, int] = {}
    for shingle, value in zip(shingles, hashes.tolist(), strict=True):
        assert table.setdefault(shingle, value) == value
    assert len(set(table.values())) == len(table), "two different shingles share a hash"


def test_shingle_width_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        shingle_hashes(np.zeros(9, dtype=np.uint8), 6)


@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_less_than_one_window_is_refused(tokens):
    with pytest.raises(UserError, match=r"less than one window of 11; give more text"):
        TokenStream(np.arange(tokens), 2, 10)


@pytest.mark.parametrize(("batch_size", "context"), [(0, 8), (4, 0), (-1, 8)])
def test_sizes_below_one_are_refused(batch_size, context):
    with pytest.raises(UserError, match="at least 1"):
        TokenStream(np.arange(100), batch_size, context)
    with pytest.raises(ValueError, match="at least 0"):
        TokenStream(np.arange(100), 1, 8).batch(-1)
