"""Tokens per expert and step, worked by hand, and what a run says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from gatewright.parts import MLP, MoELayer
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.training import train
from gatewright.training.workload import tokens_per_expert, workload_lines
from tests.training.runs import tiny_run


def test_the_least_of_all_layers_counts():
    layers = nn.ModuleList([MoELayer(8, 4, 2, 4), MoELayer(8, 16, 2, 4), MLP(8, 16)])
    # 1024 tokens: 1024 x 2 / 4 = 512 and 1024 x 2 / 16 = 128.
    assert tokens_per_expert(layers, 1024) == 128
    assert tokens_per_expert(layers[2], 1024) is None


def test_mixtures_of_mixtures_share_their_expert_s_tokens():
    inner = [MoELayer(8, 5, 2, 4) for _ in range(2)]
    outer = MoELayer(8, 2, 1, 4, weights="raw", experts=ModuleExperts(inner))
    # 1000 x 1 / 2 = 500 for each inner layer; of these 500 x 2 / 5.
    assert tokens_per_expert(outer, 1000) == 200


@pytest.mark.parametrize(("rate", "lines"), [(None, 0), (256.0, 1), (255.9, 2)])
def test_a_low_rate_is_a_line_with_a_way_out(rate: float | None, lines: int):
    found = workload_lines("sparse", rate)
    assert len(found) == lines
    assert all(line.startswith("sparse: ") and "\n" not in line for line in found)
    if lines == 2:
        assert "--batch-tokens" in found[1]
        assert "fewer experts" in found[1]


def test_a_run_says_and_records_it(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = train(tiny_run(data, tmp_path / "run", steps=2, accumulation=2))
    # 64 tokens per optimizer step, in two micro-batches; 2 of 4 experts each.
    assert "mixtral: 32 tokens per expert and optimizer step\n" in capsys.readouterr().err
    assert result.record["runs"][0]["sides"][0]["tokens_per_expert"] == 32
