"""Each metric against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gatewright.inspection import metrics

# Four tokens, E = 4, K = 2: {0,1}, {0,2}, {0,1}, {3,1}.
EXPERTS = [[0, 1], [0, 2], [1, 0], [3, 1]]


def test_domain_specialisation_is_the_share_of_tokens_and_sums_to_k() -> None:
    shares = metrics.domain_specialisation(torch.tensor(EXPERTS), 4)
    # expert 0: tokens 1, 2, 3; expert 1: tokens 1, 3, 4; experts 2 and 3: one token each
    assert shares.tolist() == [3 / 4, 3 / 4, 1 / 4, 1 / 4]
    assert shares.sum() == 2
    assert metrics.chance(64, 8) == 0.125  # OLMoE's 12.5 %
    assert metrics.chance(8, 2) == 0.25  # Mixtral's 25 %


def test_a_dropped_assignment_counts_for_nobody() -> None:
    assert metrics.domain_specialisation([[0, -1], [-1, -1]], 2).tolist() == [0.5, 0.0]


def test_domain_specialisation_refuses_no_tokens_and_foreign_ids() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        metrics.domain_specialisation(np.zeros((0, 2), dtype=int), 4)
    with pytest.raises(ValueError, match=r"0\.\.4; expected -1\.\.3"):
        metrics.domain_specialisation([[0, 4]], 4)
    with pytest.raises(ValueError, match=r"expected \[T, K\]"):
        metrics.domain_specialisation([0, 1], 4)
    with pytest.raises(ValueError, match="integer"):
        metrics.domain_specialisation([[0.0, 1.0]], 4)


def test_vocabulary_specialisation_drops_rare_tokens() -> None:
    found = metrics.vocabulary_specialisation(EXPERTS, [7, 7, 5, 7], 4, least=2)
    # id 7 stands at tokens 1, 2, 4: experts {0,1}, {0,2}, {3,1}; id 5 stands once and is left out
    assert found.ids.tolist() == [7]
    assert found.counts.tolist() == [3]
    np.testing.assert_allclose(found.shares, [[2 / 3, 2 / 3, 1 / 3, 1 / 3]])
    assert metrics.vocabulary_specialisation(EXPERTS, [7, 7, 5, 7], 4).ids.tolist() == []  # the paper's 10
    with pytest.raises(ValueError, match="3 token ids for 4 rows"):
        metrics.vocabulary_specialisation(EXPERTS, [7, 7, 5], 4)


def test_coactivation_is_not_symmetric() -> None:
    found = metrics.coactivation(EXPERTS, 5)
    # expert 0 has 3 tokens: 2 with expert 1, 1 with expert 2. expert 2 has 1 token, with expert 0.
    np.testing.assert_allclose(found[0], [0, 2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(found[2], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(found[1], [2 / 3, 0, 0, 1 / 3, 0])
    assert found[4].tolist() == [0] * 5  # unused, and no division by zero


def test_router_saturation_ignores_the_order_within_a_token() -> None:
    final = [[1, 0], [0, 3], [2, 3], [3, 1]]
    # shared with EXPERTS: both, one, none, both = 5 of 8
    assert metrics.router_saturation(EXPERTS, final) == 5 / 8
    assert metrics.router_saturation(EXPERTS, EXPERTS) == 1
    assert metrics.router_saturation([[-1, -1]], [[-1, -1]]) == 0  # dropped twice is no agreement
    with pytest.raises(ValueError, match="shapes"):
        metrics.router_saturation(EXPERTS, final[:3])


def test_repetition_of_a_short_text() -> None:
    found = metrics.repetition(EXPERTS, 4)
    # pairs: (01,02) same first, common 0; (02,10) other first, common 0; (10,31) other first, common 1
    assert found.first == 1 / 3
    assert found.any_common == 1
    assert found.first_chance == 1 / 4
    with pytest.raises(ValueError, match="two consecutive"):
        metrics.repetition(EXPERTS[:1], 4)


def test_repetition_by_chance_is_the_papers_46_4_percent() -> None:
    found = metrics.repetition([[0, 1], [2, 3]], 8)
    assert found.any_common == 0
    assert found.any_common_chance == pytest.approx(1 - (6 / 8) * (5 / 7))
    assert round(100 * found.any_common_chance, 1) == 46.4
    assert metrics.repetition([[0, 1], [1, 0]], 3).any_common_chance == 1  # 2 K > E: they must meet


def test_repetition_of_shuffled_text_returns_to_the_marginal() -> None:
    draw = np.random.default_rng(0)
    first = draw.choice(4, size=40_000, p=[0.7, 0.1, 0.1, 0.1])
    found = metrics.repetition(first[:, None], 4)
    assert found.first == pytest.approx(0.7**2 + 3 * 0.1**2, abs=0.01)  # sum of p squared, not 1/4


@pytest.mark.parametrize(
    ("counts", "entropy", "variation", "largest"),
    [
        ([5, 5, 5, 5], 1.0, 0.0, 1.0),
        ([8, 0, 0, 0], 0.0, math.sqrt(3), 4.0),
        ([2, 2, 0, 0], 0.5, 1.0, 2.0),  # ln 2 / ln 4; deviations all 1/4 of a mean 1/4
        ([3], 0.0, 0.0, 1.0),
    ],
)
def test_balance_at_known_loads(counts: list[int], entropy: float, variation: float, largest: float) -> None:
    assert metrics.load_entropy(counts) == pytest.approx(entropy)
    assert metrics.load_variation(torch.tensor(counts)) == pytest.approx(variation)
    assert metrics.max_over_mean(counts) == pytest.approx(largest)


def test_balance_works_along_the_last_axis_and_survives_no_tokens() -> None:
    counts = torch.tensor([[1, 3], [0, 0]])
    assert metrics.load_share(counts).tolist() == [[0.25, 0.75], [0.0, 0.0]]
    assert metrics.max_over_mean(counts).tolist() == [1.5, 0.0]
    assert metrics.load_variation(counts).tolist() == [0.5, 0.0]
    assert metrics.load_entropy(counts)[1] == 0


def test_metrics_take_bfloat16_and_tensors_with_gradient() -> None:
    loads = torch.tensor([0.25, 0.75], dtype=torch.bfloat16, requires_grad=True)
    assert metrics.load_share(loads).tolist() == [0.25, 0.75]
