"""Capture of choices from a real decoder, and the blocks made from them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gatewright.backbones import Decoder
from gatewright.data import ByteTokenizer
from gatewright.errors import UserError
from gatewright.inspection import capture_routing, specialisation, token_view, token_views
from gatewright.parts import MoELayer


class Parity(nn.Module):
    """A stand-in whose router is known: token id t selects experts t % 4 and (t + 1) % 4 with 3/4 and 1/4."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.rows: list[int] = []

    def forward(self, tokens: Tensor, capture: bool = False) -> Any:
        assert capture
        assert not self.training
        assert not torch.is_grad_enabled()
        self.rows.append(tokens.shape[0])
        ids = tokens.reshape(-1)
        experts = torch.stack([ids % 4, (ids + 1) % 4], dim=1)
        scores = torch.full((len(ids), 4), 0.1).scatter(
            1, experts, torch.tensor([0.6, 0.2]).expand(len(ids), 2)
        )
        weights = (self.scale * torch.tensor([0.75, 0.25])).expand(len(ids), 2)
        record = SimpleNamespace(num_experts=4, experts=experts, combine_weights=weights, scores=scores)
        return SimpleNamespace(stats={"only": record})


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    layers = [
        MoELayer(16, 8, 2, 8),
        nn.Linear(16, 16),
        MoELayer(16, 4, 1, 8, weights="raw", capacity_factor=0.5),
    ]
    return Decoder(257, 16, 2, layers, context=32)


def test_capture_returns_the_choices_in_order() -> None:
    found = capture_routing(Parity(), [[0, 1], [2, 3]])["only"]
    assert found.experts.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert found.weights.tolist() == [[0.75, 0.25]] * 4
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.2]] * 4))
    assert (found.num_experts, found.num_selected) == (4, 2)
    assert not found.weights.requires_grad


def test_capture_leaves_every_training_flag_and_gradient_as_it_was(decoder: Decoder) -> None:
    decoder.train()
    decoder.layers[0].eval()  # a frozen block must stay frozen
    before = {name: module.training for name, module in decoder.named_modules()}
    found = capture_routing(decoder, torch.arange(24).reshape(2, 12))
    assert {name: module.training for name, module in decoder.named_modules()} == before
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert torch.is_grad_enabled()
    assert list(found) == ["layers.0.router", "layers.2.router"]
    assert found["layers.0.router"].experts.shape == (24, 2)
    torch.testing.assert_close(found["layers.0.router"].weights.sum(1), torch.ones(24))


def test_flags_come_back_after_an_error() -> None:
    model = Parity().train()
    with pytest.raises(AssertionError):
        capture_routing(model, [[0]]) if model.register_forward_pre_hook(_fail) else None
    assert model.training


def _fail(*_: Any) -> None:
    raise AssertionError("stop")


def test_specialisation_by_hand() -> None:
    texts = {"even": np.array([0, 2, 0, 2]), "zero": np.array([4, 4])}
    block = specialisation(Parity(), texts, context=2)
    # even: 0 -> {0,1}, 2 -> {2,3}: every expert on half the tokens; zero: 4 -> {0,1}
    assert block["routers"] == {"only": [[0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0]]}
    assert (block["domains"], block["chance"], block["num_selected"]) == (["even", "zero"], 0.5, 2)


def test_specialisation_reads_in_batches_and_stops_at_its_limit() -> None:
    model = Parity()
    block = specialisation(model, {"a": np.arange(1000)}, context=10, batch_size=4, most_tokens=100)
    assert model.rows == [4, 4, 2]
    assert block["routers"]["only"] == [[0.5, 0.5, 0.5, 0.5]]


def test_specialisation_counts_what_the_router_did(decoder: Decoder) -> None:
    texts = {"a": np.arange(64), "b": np.full(20, 7)}
    block = specialisation(decoder, texts, context=32)
    assert sum(block["routers"]["layers.0.router"][0]) == pytest.approx(2, abs=1e-4)
    # capacity 0.5 keeps at most half of the assignments of a top-1 router
    assert sum(block["routers"]["layers.2.router"][0]) <= 0.5 + 1e-6
    assert block["chances"] == {"layers.0.router": 0.25, "layers.2.router": 0.25}
    with pytest.raises(UserError, match="domain empty holds no token"):
        specialisation(decoder, {"empty": np.array([], dtype=np.int64)}, context=32)


def test_token_view_holds_every_piece_and_reads_in_windows() -> None:
    view = token_view(Parity(), [0, 1, 2], ["a", "<b>", "c"], domain="d", context=2)
    assert view["pieces"] == ["a", "<b>", "c"]
    assert view["routers"]["only"]["experts"] == [[0, 1], [1, 2], [2, 3]]
    assert view["routers"]["only"]["weights"] == [[0.75, 0.25]] * 3
    with pytest.raises(UserError, match="2 pieces for 3 tokens"):
        token_view(Parity(), [0, 1, 2], ["a", "b"], domain="d", context=2)


def test_token_views_leave_out_the_leading_end_of_text() -> None:
    tokenizer = ByteTokenizer()
    text = np.concatenate([[tokenizer.eot], tokenizer.encode("wörd")])
    views = token_views(Parity(), {"a": text, "none": text[:0]}, tokenizer, context=8, length=3)
    assert [view["domain"] for view in views] == ["a"]
    assert views[0]["pieces"][0] == "w"
    assert len(views[0]["pieces"]) == 3
    json.dumps(views)


def test_a_dense_model_is_refused() -> None:
    dense = Decoder(257, 16, 2, [nn.Linear(16, 16)], context=32)
    with pytest.raises(UserError, match="no router"):
        capture_routing(dense, [[1, 2]])
