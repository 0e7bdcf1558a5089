"""Generation drops no token, whatever capacity a layer has."""

from __future__ import annotations

import torch

from gatewright.generation import generate
from gatewright.parts import Capacity, MoELayer
from tests.test_generation import PROMPT, build


def test_nothing_is_dropped_in_generation_and_the_capacity_is_back_afterwards():
    model = build("olmoe")
    dropped: list[int] = []
    layers = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
    for layer in layers:
        layer.register_forward_hook(
            lambda *call: dropped.append(int(call[2][1]["router"].dropped_by_rank.sum()))
        )
    for capacity in (Capacity(0.1, order="rank"), Capacity(2.0, eval_factor=0.1, reroute=True)):
        for layer in layers:
            layer.capacity = capacity
        dropped.clear()
        model(torch.tensor([PROMPT]))
        assert all(count > 0 for count in dropped), "the capacity is one that drops"
        dropped.clear()
        generate(model, PROMPT, max_new_tokens=3)
        assert len(dropped) == 3 * len(layers)
        assert not any(dropped)
        assert all(layer.capacity is capacity for layer in layers)
