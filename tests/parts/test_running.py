"""Running counts: f of a global batch under accumulation, its error bound, ranks, recomputation, reset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gatewright.parts import MoELayer, Stats, balance_loss
from gatewright.parts.running import RunningCounts
from tests.parts.seen import layers_of, random_logits, stats_of


def two_pass(micro_batches: list[Stats]) -> list[Tensor]:
    """Return each micro-batch's loss with f of all of them."""
    running = RunningCounts()
    for stats in micro_batches:
        running.add(stats)
    return [balance_loss(stats, "global_batch", running.counts) for stats in micro_batches]


def test_running_counts_by_hand():
    # E = 2, K = 1. First micro-batch (3/4, 1/4) twice: f = (1, 0): 2 * 3/4 = 3/2. Second (1/4, 3/4) twice:
    # counts (2, 2), f = (1/2, 1/2): 1, though alone it costs 3/2. Exact: 1, 1. A reset forgets: 3/2 again.
    ln3 = torch.tensor(3.0, dtype=torch.float64).log().item()
    first, second = stats_of([[ln3, 0.0]] * 2), stats_of([[0.0, ln3]] * 2)
    running = RunningCounts()
    assert running.loss(first).item() == pytest.approx(3 / 2, abs=1e-15)
    assert running.loss(second).item() == pytest.approx(1, abs=1e-15)
    assert running.counts["router"].tolist() == [2, 2]
    assert [loss.item() for loss in two_pass([first, second])] == pytest.approx([1, 1])
    running.reset()
    assert running.counts == {}
    assert running.loss(second).item() == pytest.approx(3 / 2, abs=1e-15)


def test_the_last_micro_batch_is_exact():
    micro_batches = [stats_of(random_logits(7, 5, seed=seed), 2) for seed in range(4)]
    running = RunningCounts()
    last = [running.loss(stats) for stats in micro_batches][-1]
    assert torch.equal(last, two_pass(micro_batches)[-1])


def test_micro_batches_of_equal_f_are_exact_everywhere():
    stats = stats_of(random_logits(7, 5), 2)
    running = RunningCounts()
    losses = [running.loss(stats).item() for _ in range(4)]
    assert losses == pytest.approx([balance_loss(stats).item()] * 4, rel=1e-14)


@pytest.mark.parametrize("seed", range(20))
def test_the_error_is_within_its_bound(seed: int):
    # E (1 - a / A) * (half the summed |f of 1..a - f of the rest|) * (max P - min P).
    num_experts, steps = 6, 5
    micro_batches = [
        stats_of(random_logits(8, num_experts, seed=100 * seed + a, skew=a * 0.3), 2) for a in range(steps)
    ]
    counts = torch.stack([stats["router"].counts for stats in micro_batches]).double()
    exact = two_pass(micro_batches)
    running, errors = RunningCounts(), []
    for a, stats in enumerate(micro_batches, 1):
        error = abs(running.loss(stats).item() - exact[a - 1].item())
        rest = counts[a:].sum(dim=0) / counts[a:].sum() if a < steps else counts.sum(dim=0) / counts.sum()
        distance = (counts[:a].sum(dim=0) / counts[:a].sum() - rest).abs().sum().item() / 2
        p = stats["router"].score_sums / 8
        bound = num_experts * (1 - a / steps) * distance * (p.max() - p.min()).item()
        assert error <= bound + 1e-12
        errors.append(error)
    assert max(errors) > 1e-3, "the case shows an error at all"


def test_the_error_of_a_realistic_step():
    # E = 64, K = 8, 8 micro-batches of 2,048 tokens, experts of unequal popularity: figures of the docstring.
    popularity = random_logits(64, skew=0.0)
    micro_batches = [stats_of(random_logits(2048, 64, seed=a, skew=0.0) + popularity, 8) for a in range(1, 9)]
    exact = [loss.item() for loss in two_pass(micro_batches)]
    running = RunningCounts()
    found = [running.loss(stats).item() for stats in micro_batches]
    assert abs(sum(found) / sum(exact) - 1) < 0.0025
    assert max(abs(ours / theirs - 1) for ours, theirs in zip(found, exact, strict=True)) < 0.01
    assert exact[0] > 2, "far from balanced"


def test_domains_in_turn_show_that_it_is_an_approximation():
    first, second = stats_of([[9.0, 0.0]] * 4), stats_of([[0.0, 9.0]] * 4)
    running = RunningCounts()
    found = [running.loss(stats).item() for stats in (first, second)]
    assert found[0] > 1.99
    assert found[1] == pytest.approx(1)
    assert [loss.item() for loss in two_pass([first, second])] == pytest.approx([1, 1])


def test_counts_are_summed_over_ranks_in_one_vector():
    # Two ranks, two layers of different width: the reduction gets all counts at once, sorted by router.
    here = layers_of(random_logits(6, 4)) | stats_of(random_logits(6, 3)).under("layers.1")
    there = layers_of(random_logits(6, 4, seed=1)) | stats_of(random_logits(6, 3, seed=1)).under("layers.1")
    seen = []

    def all_reduce(counts: Tensor) -> Tensor:
        seen.append(counts.clone())
        other = torch.cat([there[name].counts for name in sorted(there)])
        return counts.add_(other)  # in place, as torch.distributed does

    running = RunningCounts(all_reduce)
    loss = running.loss(here)
    assert [counts.shape for counts in seen] == [(7,)]
    for name in here:
        assert torch.equal(running.counts[name], here[name].counts + there[name].counts)
    assert torch.equal(loss, balance_loss(here, "global_batch", running.counts))
    assert here["layers.0.router"].counts.sum() == 6, "the Stats are as they were"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_number_of_ranks_does_not_matter(ranks: int):
    # 8 tokens per micro-batch on one rank, or shared by several: the mean over ranks is the same loss.
    micro_batches = [random_logits(8, 5, seed=seed) for seed in range(3)]
    alone = RunningCounts()
    expected = [alone.loss(stats_of(batch, 2)).item() for batch in micro_batches]
    found = []
    totals = iter([stats_of(batch, 2)["router"].counts for batch in micro_batches for _ in range(ranks)])
    shared = [RunningCounts(lambda _: next(totals)) for _ in range(ranks)]
    for batch in micro_batches:
        parts = batch.split(8 // ranks)
        losses = [running.loss(stats_of(part, 2)) for running, part in zip(shared, parts, strict=True)]
        found.append(torch.stack(losses).mean().item())
    assert found == pytest.approx(expected, rel=1e-14)


def test_recomputation_does_not_count_twice():
    torch.manual_seed(0)
    layer = MoELayer(6, 4, 2, 5)
    x = torch.randn(7, 6)
    running = RunningCounts()
    y, stats = checkpoint(layer, x, use_reentrant=False)
    (y.square().sum() + running.loss(stats)).backward()
    assert running.counts["router"].sum() == 14


def test_the_gradient_goes_through_the_micro_batchs_own_scores():
    logits = [random_logits(6, 4, seed=seed).requires_grad_() for seed in range(2)]
    running = RunningCounts()
    first, second = (running.loss(stats_of(x)) for x in logits)
    assert not running.counts["router"].requires_grad
    second.backward()
    assert logits[0].grad is None
    assert logits[1].grad is not None
    assert logits[1].grad.abs().sum() > 0
    first.backward()
    assert logits[0].grad is not None


def test_no_routers():
    running = RunningCounts()
    assert running.loss(Stats()).item() == 0
    assert running.counts == {}
