"""Sides take turns in every order, and a ratio is taken inside its round."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable

import pytest

from gatewright.errors import UserError
from gatewright.measuring import rounds


class FakeClock:
    """A clock that moves when a side runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def side(self, name: str, *costs: float) -> rounds.Turn:
        left = list(costs)

        def call() -> None:
            assert not gc.isenabled()
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        def clear() -> None:
            self.now += 1000.0  # what is not timed

        return rounds.Turn(call, clear)

    def read(self) -> float:
        return self.now


@pytest.mark.parametrize("count", range(1, 9))
def test_every_side_stands_in_every_place_and_behind_every_other_equally_often(count: int):
    designs = rounds.orders(count)
    assert all(sorted(order) == list(range(count)) for order in designs)
    assert len(designs) == (count if count % 2 == 0 or count == 1 else 2 * count)
    for place in range(count):
        assert set(Counter(order[place] for order in designs).values()) == {len(designs) // count}
    pairs = Counter(pair for order in designs for pair in itertools.pairwise(order))
    assert len(pairs) == count * (count - 1)
    assert len(set(pairs.values())) <= 1


def test_rounds_use_all_orders_and_time_the_call_alone():
    clock = FakeClock()
    sides = {name: clock.side(name, cost) for name, cost in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("d", 4.0))}
    seconds = rounds.time_rounds(sides, 8, clock.read)
    assert seconds == {"a": [1.0] * 8, "b": [2.0] * 8, "c": [3.0] * 8, "d": [4.0] * 8}
    turns = ["".join(clock.calls[at : at + 4]) for at in range(0, 32, 4)]
    assert len(set(turns)) == 4
    assert turns[:4] == turns[4:]
    assert gc.isenabled()


def test_garbage_is_collected_again_after_a_failure():
    def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        rounds.time_rounds({"a": rounds.Turn(broken, lambda: None)}, 1)
    assert gc.isenabled()


def test_ratios_are_paired_by_hand():
    # A machine that slows down threefold for some rounds slows both sides: every round's ratio is 2.
    ours, dense = [2.0, 6.0, 2.0, 6.0, 2.0], [1.0, 3.0, 1.0, 3.0, 1.0]
    assert rounds.paired(ours, dense) == (2.0, 2.0, 2.0)
    # Ratios 3, 1/10 and 10: their median is 3, while the medians of both sides, 10 and 10, would say 1.
    assert rounds.paired([3.0, 10.0, 100.0], [1.0, 100.0, 10.0]) == (3.0, 0.1, 10.0)


def test_the_best_side_is_found_round_by_round():
    seconds = {"a": [1.0, 5.0, 3.0], "b": [2.0, 4.0, 9.0], "c": [0.1, 0.1, 0.1]}
    assert rounds.best_of_rounds(seconds, ["a", "b"]) == [1.0, 4.0, 3.0]


def test_percentiles_spread_and_means_by_hand():
    values = [float(n) for n in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110)]
    assert rounds.middle(values[::-1]) == (60.0, 20.0, 100.0)
    assert rounds.spread(values) == pytest.approx(80 / 60)
    assert rounds.geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


def test_few_rounds_are_refused():
    check: Callable[[int], None] = rounds.check_rounds
    check(11)
    with pytest.raises(UserError, match="rounds 10; allowed: 11 or more"):
        check(10)
