"""Scores of candidate answers: by hand, against a model that is read whole, and apart from neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.evaluation.candidates import candidate_scores, score_of
from gatewright.papers.switch import Settings, build
from gatewright.parts import MoELayer

CANDIDATES = [[1, 2, 9], [7, 9], [9]]


def model(**changes: object) -> Decoder:
    """Return a small Switch decoder of ten ids."""
    torch.manual_seed(0)
    small = {"vocab_size": 10, "width": 16, "num_heads": 2, "head_dim": 8, "context": 16}
    made = build(Settings(**{**small, "expert_width": 16, "ffn_width": 16, "num_experts": 4, **changes}))  # type: ignore[arg-type]
    assert isinstance(made, Decoder)
    return made


class Table(Decoder):
    """Next ids follow from the last one alone, by a table of probabilities that are written down."""

    # p(next | last) of four ids.
    TABLE = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25],
                          [0.125, 0.125, 0.25, 0.5], [0.25, 0.5, 0.125, 0.125]]).log()  # fmt: skip

    def __init__(self) -> None:
        inner = model(vocab_size=4)
        super().__init__(4, 16, 2, [block.feed_forward for block in inner.layers], context=16)

    def forward(self, tokens: Tensor, *args: object, **more: object):  # type: ignore[no-untyped-def]
        output = super().forward(tokens, *args, **more)  # type: ignore[arg-type]
        last = tokens[:, -1:] if more.get("only_last") else tokens
        return output._replace(logits=self.TABLE[last])


def test_a_candidate_s_likelihood_by_hand():
    found = candidate_scores(Table(), torch.tensor([[3, 0], [1, 2]]), [[1, 2, 3], [2, 3], [3]])
    # After 0: 1 (1/4), 2 after 1 (1/4), 3 after 2 (1/2); 2 (1/8), 3 after 2 (1/2); 3 (1/8).
    # After 2: 1 (1/8), 2 after 1 (1/4), 3 after 2 (1/2); 2 (1/4), 3 after 2 (1/2); 3 (1/2).
    wanted = [[1 / 32, 1 / 16, 1 / 8], [1 / 64, 1 / 8, 1 / 2]]
    assert found.exp().tolist() == [pytest.approx(row, rel=1e-6) for row in wanted]
    score = score_of(found, torch.tensor([2, 1]))
    assert score.accuracy == 0.5
    # 1/8 of 7/32 is 4/7; 1/8 of 41/64 is 8/41.
    assert score.nats == pytest.approx(-(math.log(4 / 7) + math.log(8 / 41)) / 2)


def test_they_are_those_of_the_whole_text_and_of_no_neighbour():
    own = model()
    prompts = torch.randint(0, 10, (7, 6), generator=torch.Generator().manual_seed(1))
    found = candidate_scores(own, prompts, CANDIDATES, batch_size=3)
    assert own.training
    layers = [module for module in own.modules() if isinstance(module, MoELayer)]
    assert [layer.capacity_factor for layer in layers] == [1.25]
    own.eval()
    for layer in layers:
        layer.capacity = None
    for row, prompt in enumerate(prompts):
        for place, ids in enumerate(CANDIDATES):
            text = torch.cat([prompt, torch.tensor(ids)])[None]
            logits = own(text).logits.detach().double().log_softmax(-1)[0]
            slow = sum(float(logits[5 + j, one]) for j, one in enumerate(ids))
            assert float(found[row, place]) == pytest.approx(slow, abs=1e-5)
    alone = candidate_scores(own, prompts[4:5], CANDIDATES)
    assert torch.allclose(alone[0], found[4], atol=1e-6)


def test_a_tie_goes_to_the_first():
    assert score_of(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])) == (0.5, math.log(3))
