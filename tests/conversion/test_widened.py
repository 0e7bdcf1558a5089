"""Dense layers of unequal widths are exported as layers of one, with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gatewright
from gatewright.conversion.widened import _widen
from gatewright.experiments.convert import ConvertRun, convert
from gatewright.parts import MLP
from gatewright.training import train
from tests.training import runs

parity = pytest.importorskip("tests.papers.test_parity", exc_type=ImportError)


def test_a_twin_of_unequal_widths_becomes_a_llama_of_one(tmp_path: Path):
    dense: dict[str, Any] = {"moe_layers": "none", "num_layers": 2, "ffn_width": (7, 6)}
    train(runs.tiny_run(runs.write_text(tmp_path / "text"), tmp_path / "run", steps=2, **dense))
    found = convert(tmp_path / "run", tmp_path / "out", ConvertRun(verify=True))
    assert (found.kind, found.added) == ("llama", 1)
    assert "1 hidden unit of zeros added" in found.to_text()
    tokens = torch.randint(0, 256, (2, 9))
    run, other = (gatewright.load(tmp_path / name) for name in ("run", "out"))
    with torch.no_grad():
        parity.near(run(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_hidden_units_of_zeros_change_no_output(activation: str):
    torch.manual_seed(0)
    layer, x = MLP(5, 3, activation, bias=True), torch.randn(4, 5)
    torch.nn.init.normal_(layer.b_in)
    expected = layer(x)
    _widen(layer, 3, 6)
    assert layer.w_down.shape == (5, 6)
    torch.testing.assert_close(layer(x), expected)
