"""What was kept and how much smaller: the paper's own numbers."""

from __future__ import annotations

import pytest

from gatewright.backbones import count_cost, on_no_memory
from gatewright.evaluation import compression, gain_kept
from gatewright.papers.switch_t5 import PUBLISHED, build

DENSE = 1.636
# Table 7: the teacher's and its student's log perplexity, turned so that lower is better, and per cent kept.
TABLE7 = [
    (1.505, 1.587, 37),  # 0.049 / 0.131
    (1.474, 1.585, 32),  # 0.051 / 0.162 = 31.5
    (1.444, 1.579, 30),  # 0.057 / 0.192 = 29.7
    (1.432, 1.582, 27),  # 0.054 / 0.204 = 26.5
    (1.427, 1.578, 28),  # 0.058 / 0.209 = 27.8
]


@pytest.mark.parametrize(("teacher", "student", "percent"), TABLE7)
def test_table_7_follows_from_its_log_perplexities(teacher: float, student: float, percent: int):
    found = gain_kept(student, teacher, DENSE)
    assert found is not None
    # 26.47 is printed as 27: the paper rounds what it has, not what it prints.
    assert found == pytest.approx(percent, abs=0.55)


def test_the_ends_of_the_scale():
    assert gain_kept(1.444, 1.444, DENSE) == pytest.approx(100)
    assert gain_kept(DENSE, 1.444, DENSE) == 0
    # Table 6, weights copied and nothing taught: -1.639 is below the dense model. 100 * -0.003 / 0.192.
    assert gain_kept(1.639, 1.444, DENSE) == pytest.approx(-1.5625)
    assert gain_kept(1.5, 1.7, DENSE) is None
    assert gain_kept(1.5, DENSE, DENSE) is None


def test_compression_by_hand_and_as_table_7_has_it():
    assert compression(1, 4) == 75
    # Table 7's teachers are Switch-Base with 16 to 256 experts, counted from our own.
    sizes, printed = {}, {16: 82, 32: 90, 64: 95, 128: 97, 256: 99}
    for number in printed:
        with on_no_memory():
            model = build(
                type(PUBLISHED["switch-base"])(**{**vars(PUBLISHED["switch-base"]), "num_experts": number})
            )
        sizes[number] = count_cost(model, 512).total_parameters
    assert [round(size / 1e9, 1) for size in sizes.values()] == [1.1, 2.0, 3.8, 7.4, 14.7]
    student, embedding = 223_000_000, 32128 * 768
    assert [round(compression(student, size)) for size in sizes.values()] == [79, 89, 94, 97, 98]
    # The printed per cents are those of a student without its embedding (of the teachers as printed).
    rounded = [1_100, 2_000, 3_800, 7_400, 14_700]
    found = [round(compression(student - embedding, 1_000_000 * size)) for size in rounded]
    assert found == list(printed.values())
