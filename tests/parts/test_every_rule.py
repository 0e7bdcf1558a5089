"""What every named router must keep, whatever it scores and selects by: a new file in parts/rules is held to
all of this without being named here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gatewright.parts import MoELayer, RouterInfo, all_routers
from tests.parts.every import KEY, layer_of, losses, tokens

ROOT = Path(__file__).resolve().parents[2]
ROUTERS = all_routers()
EVERY = pytest.mark.parametrize("info", ROUTERS, ids=[info.name for info in ROUTERS])


def leaks(info: RouterInfo, training: bool) -> bool:
    """Return whether any of 40 changes to later tokens changed an earlier token's output."""
    for trial in range(40):
        layer = layer_of(info, seed=trial).train(training)
        x, ids = tokens(24, seed=trial)
        place = 4 + trial % 17
        later, later_ids = tokens(24, seed=1000 + trial)
        # A part that all tokens share crowds experts: half-empty capacities would hide a leak.
        x, later = x + trial % 3, later + trial % 3
        changed = torch.cat([x[:, :place], 3 * later[:, place:]], dim=1)
        changed_ids = torch.cat([ids[:, :place], later_ids[:, place:]], dim=1)
        with torch.no_grad():
            before, _ = layer(x, key=KEY, token_ids=ids)
            after, _ = layer(changed, key=KEY, token_ids=changed_ids)
        if not torch.allclose(before[:, :place], after[:, :place], rtol=1e-4, atol=1e-6):
            return True
    return False


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_rule_that_says_causal_never_looks_ahead_and_one_that_does_not_is_seen_to(
    info: RouterInfo, training: bool
):
    causal = info.causal if training else info.causal_at_inference
    assert leaks(info, training) is not causal


@EVERY
def test_recomputed_activations_give_the_same_gradients_to_the_bit(info: RouterInfo):
    gradients = []
    for recompute in (False, True):
        layer = layer_of(info)
        x, ids = tokens(24)
        x.requires_grad_()

        def run(x: Tensor, layer: MoELayer = layer, ids: Tensor = ids) -> tuple[Tensor, Tensor]:
            y, stats = layer(x, key=KEY, token_ids=ids)
            return y, losses(stats)

        y, loss = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        (y.square().sum() + loss).backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None and again is None) or torch.equal(plain, again)


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    """Return, for each router, "" or what differs between compiled and eager (tests/parts/compiled.py)."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parts.compiled"], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@EVERY
@pytest.mark.timeout(300)
def test_compiled_whole_it_gives_what_eager_gives(info: RouterInfo, compiled: dict[str, str]):
    if info.name == "base":
        pytest.skip("the optimal assignment is found in eager mode only")
    assert compiled[info.name] == ""


@EVERY
def test_in_bf16_it_goes_the_same_way_and_ends_near(info: RouterInfo):
    layer = layer_of(info).eval()
    x, ids = tokens(24)
    x = x.bfloat16().float()
    wide, stats = layer(x, key=KEY, token_ids=ids)
    layer.experts.bfloat16()
    near, narrow = layer(x.bfloat16(), key=KEY, token_ids=ids)
    assert near.dtype == torch.bfloat16
    assert torch.equal(stats["router"].counts, narrow["router"].counts)
    assert (near.float() - wide).abs().max() <= 3e-2 * wide.abs().max().clamp(min=1)


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_padding_is_nobody(info: RouterInfo, training: bool):
    layer = layer_of(info).train(training)
    x, ids = tokens(24)
    mask = torch.ones(1, 24, dtype=torch.bool)
    mask[:, 15:] = False
    results = []
    for junk in (0.0, float("nan"), 1e3):
        given = torch.where(mask.unsqueeze(-1), x, junk)
        y, stats = layer(given, mask, key=KEY, token_ids=ids)
        assert not y[~mask].any()
        results.append((y, stats["router"]))
    (first, record), *others = results
    assert int(record.tokens) == 15
    for y, other in others:
        assert torch.equal(first, y)
        assert torch.equal(record.counts, other.counts)
        assert torch.equal(record.score_sums, other.score_sums)
        for name, value in record.sums.items():
            assert torch.equal(value, other.sums[name]), name
    assert int(record.kept.sum()) + int(record.dropped_by_rank.sum()) == int(record.counts.sum())


@EVERY
@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens_or_padding_alone_are_no_special_case(info: RouterInfo, num_tokens: int):
    for training in (True, False):
        layer = layer_of(info).train(training)
        x, ids = tokens(num_tokens)
        for mask in (None, torch.zeros(1, num_tokens, dtype=torch.bool)):
            y, stats = layer(x, mask, key=KEY, token_ids=ids)
            assert y.shape == x.shape
            assert torch.isfinite(y).all()
            assert all(torch.isfinite(value.float()).all() for value in stats["router"].sums.values())


def draws(info: RouterInfo) -> bool:
    """Return whether the rule's training depends on the key."""
    x, ids = tokens(24)
    layer = layer_of(info)
    outputs = [layer(x, key=torch.tensor(k), token_ids=ids)[0] for k in (1, 2, 3)]
    return not (torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2]))


@EVERY
def test_whole_groups_may_be_split_over_calls(info: RouterInfo):
    training = not draws(info)
    layer = layer_of(info, group_size=8).train(training)
    x, ids = tokens(24)
    mask = torch.ones(1, 24, dtype=torch.bool)
    mask[:, 13:18] = False
    whole, stats = layer(x, mask, key=KEY, token_ids=ids)
    parts = [
        layer(x[:, s : s + 8], mask[:, s : s + 8], key=KEY, token_ids=ids[:, s : s + 8]) for s in (0, 8, 16)
    ]
    torch.testing.assert_close(whole, torch.cat([y for y, _ in parts], dim=1), rtol=1e-5, atol=1e-6)
    group_counts = torch.cat([own["router"].group_counts for _, own in parts])
    assert torch.equal(stats["router"].group_counts, group_counts)


@EVERY
def test_the_task_teaches_the_router(info: RouterInfo):
    layer = layer_of(info)
    x, ids = tokens(24)
    y, stats = layer(x, key=KEY, token_ids=ids)
    (y.square().sum() + sum(v.sum() for v in stats["router"].sums.values() if v.requires_grad)).backward()
    learned = [p for p in layer.router.parameters() if p.grad is not None and p.grad.any()]
    assert learned or info.name == "hash"


@EVERY
def test_the_same_key_gives_the_same_numbers_and_evaluation_asks_for_none(info: RouterInfo):
    x, ids = tokens(24)
    layer = layer_of(info)
    first, second = (layer(x, key=KEY, token_ids=ids)[0] for _ in range(2))
    assert torch.equal(first, second)
    layer.eval()
    quiet = [layer(x, key=key, token_ids=ids)[0] for key in (KEY, torch.tensor(8), None)]
    assert torch.equal(quiet[0], quiet[1])
    assert torch.equal(quiet[0], quiet[2])


@EVERY
def test_its_line_of_the_table_is_whole(info: RouterInfo):
    for phrase in (info.scores, info.selection, info.weights, info.capacity, info.used_by, info.source):
        assert phrase
        assert phrase.isascii()
        assert len(phrase) <= 120


@EVERY
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_goes_the_same_way(info: RouterInfo):
    x, ids = tokens(24)
    layer = layer_of(info)
    here, stats = layer(x, key=KEY, token_ids=ids)
    moved = layer.cuda()
    there, other = moved(x.cuda(), key=KEY.cuda(), token_ids=ids.cuda())
    assert torch.equal(stats["router"].counts, other["router"].counts.cpu())
    torch.testing.assert_close(here, there.cpu(), rtol=1e-4, atol=1e-5)
