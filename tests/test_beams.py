"""Beam search: equal to trying every target, one beam greedy, rows of a batch alone."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.backbones import EncoderDecoder
from gatewright.beams import BeamSearch, Written, beam_search, length_penalty
from gatewright.errors import RunFailure, UserError
from gatewright.parts import MLP, MoELayer

VOCAB, START, END = 4, 3, 0


def model(seed: int = 0, vocab: int = VOCAB) -> EncoderDecoder:
    """Return a small fp64 model with a mixture of little capacity, whose targets end at different lengths."""
    torch.manual_seed(seed)
    stacks = [[MLP(8, 8, "relu"), MoELayer(8, 2, 1, 8, weights="raw", capacity_factor=0.5)] for _ in range(2)]
    net = EncoderDecoder(vocab, 8, 2, *stacks, head_dim=4).double().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" not in name:
                p.normal_(std=0.7)
    return net


def sources(rows: int = 3, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (rows, 5), generator=torch.Generator().manual_seed(2))


@cache
def every_value(seed: int, row: int, longest: int) -> list[tuple[list[int], float]]:
    """Return every target of one source with its log-probability: each read whole, without a cache."""
    net, source = model(seed), sources(2)[row : row + 1]
    for layer in net.modules():
        if isinstance(layer, MoELayer):
            layer.capacity = None
    found = []
    for length in range(1, longest + 1):
        every = [
            list(ids)
            for ids in itertools.product(range(VOCAB), repeat=length)
            if END not in ids[:-1] and (ids[-1] == END or length == longest)
        ]
        ids = torch.tensor(every)
        target = torch.cat([torch.full((len(every), 1), START), ids[:, :-1]], dim=1)
        with torch.no_grad():
            logits = net(source.expand(len(every), -1), target).logits
        values = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum(dim=(1, 2))
        found += list(zip(every, values.tolist(), strict=True))
    return found


def every_target(seed: int, row: int, alpha: float, longest: int) -> list[Written]:
    """Return them all, the best first."""
    found = []
    for ids, value in every_value(seed, row, longest):
        penalty = ((5 + len(ids)) ** alpha) / (6**alpha)
        found.append(Written(ids[:-1] if ids[-1] == END else ids, value, value / penalty))
    return sorted(found, key=lambda one: -one.score)


def test_the_penalty_by_hand():
    # (5 + 7)^.5 / 6^.5 = sqrt 2; a single id is not penalised, nor is anything at alpha 0.
    assert length_penalty(7, 0.5) == pytest.approx(math.sqrt(2))
    assert length_penalty(1, 0.9) == length_penalty(40, 0.0) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_beams_find_what_trying_everything_finds(alpha: float, seed: int):
    # 40 targets of up to 3 ids, and no more are open at once: 40 beams prune none.
    net, source = model(seed), sources(2)
    search = BeamSearch(beams=40, alpha=alpha, max_length=3)
    found = beam_search(net, source, start=START, end=END, search=search)
    for row in range(2):
        expected = every_target(seed, row, alpha, 3)
        assert len(found[row]) == len(expected) == 1 + 3 + 9 * VOCAB
        for ours, theirs in zip(found[row], expected, strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-10)
            assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-10)
        assert [one.ids for one in found[row][:10]] == [one.ids for one in expected[:10]]


def test_longer_targets_win_with_a_greater_alpha():
    net, source = model(), sources(1)
    best = [
        beam_search(net, source, start=START, end=END, search=BeamSearch(40, alpha, 3))[0][0]
        for alpha in (0.0, 5.0)
    ]
    assert len(best[0].ids) < len(best[1].ids)
    assert best[0].log_probability > best[1].log_probability


@torch.no_grad()
def test_one_beam_is_greedy():
    net, source = model(vocab=6), sources(6, 6)
    found = beam_search(net, source, start=START, end=END, search=BeamSearch(1, max_length=8))
    for layer in net.modules():
        if isinstance(layer, MoELayer):
            layer.capacity = None
    lengths = set()
    for row in range(6):
        ids = [START]
        while len(ids) <= 8 and (len(ids) == 1 or ids[-1] != END):
            ids.append(int(net(source[row : row + 1], torch.tensor([ids])).logits[0, -1].argmax()))
        lengths.add(len(ids))
        assert found[row][0].ids == [i for i in ids[1:] if i != END]
    assert len(lengths) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_does_not_depend_on_the_others_or_on_padding(beams: int):
    net, source = model(vocab=30), sources(3, 30)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5])
    search: Any = {"start": START, "end": END, "search": BeamSearch(beams, max_length=8)}
    together = beam_search(net, source, source_mask=mask, **search)
    for row, length in enumerate((5, 3, 5)):
        (alone,) = beam_search(net, source[row : row + 1, :length], **search)
        assert [one.ids for one in alone] == [one.ids for one in together[row]]
        assert [one.score for one in alone] == pytest.approx([one.score for one in together[row]])
        assert len(alone) == beams


def test_the_model_is_left_as_it_was():
    net = model().train()
    beam_search(net, sources(), start=START, end=END)
    assert net.training
    assert all(layer.capacity is not None for layer in net.modules() if isinstance(layer, MoELayer))


def test_what_cannot_be_is_refused_in_one_line():
    net = model()
    with pytest.raises(UserError, match="end id 4; allowed: 0 to 3"):
        beam_search(net, sources(), start=START, end=4)
    with pytest.raises(UserError, match=r"source torch.int64 \[5\]; allowed: torch.int64 \[B, P\]"):
        beam_search(net, sources()[0], start=START, end=END)
    with pytest.raises(UserError, match="beams 0, max_length 128; allowed: 1 or more"):
        BeamSearch(beams=0)
    with pytest.raises(UserError, match="alpha -1; allowed: 0"):
        BeamSearch(alpha=-1)
    with torch.no_grad():
        net.head.weight.fill_(torch.nan)
    with pytest.raises(RunFailure, match="logits are not finite"):
        beam_search(net, sources(), start=START, end=END)
