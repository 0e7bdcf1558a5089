"""Table 9 of 2017: whose strongest inputs are counted, and how."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from gatewright.data.tokenizer import ByteTokenizer
from gatewright.experiments import gated_experts
from gatewright.experiments.gated_experts import ExpertsPlan, specialists, verdict9


class Spelling:
    """A model whose gate sends each token to experts t % 4 and (t + 1) % 4, surer of larger tokens."""

    def routers(self) -> dict[str, Any]:
        return {"only": SimpleNamespace(weight=torch.zeros(4, 1))}


def test_the_strongest_inputs_of_an_expert_by_hand(monkeypatch: pytest.MonkeyPatch):
    def captured(net: Any, batch: torch.Tensor) -> Any:
        ids = batch.reshape(-1)
        experts = torch.stack([ids % 4, (ids + 1) % 4], dim=1)
        strong = ids / 300
        return {"only": SimpleNamespace(experts=experts, weights=torch.stack([strong, 1 - strong], dim=1))}

    monkeypatch.setattr(gated_experts, "capture_routing", captured)
    text = np.frombuffer(b"abcdabcdabcdeeee", dtype=np.uint8).astype(np.int64)
    plan = ExpertsPlan(models=(), context=4, rows=2, strongest=4, contexts=2)
    found = {
        own["expert"]: own
        for own in specialists(cast(Any, Spelling()), {"text": text}, ByteTokenizer(), plan)
    }
    # Expert 2 has a (97, its second choice, 1 - 97 / 300 = 0.677) three times, e (0.663) four times and b
    # (98, its first, 0.327) three times: the four strongest are a, a, a, e.
    assert sorted(found) == [0, 1, 2, 3]
    assert found[2]["token"] == "a"
    assert found[2]["purity"] == pytest.approx(3 / 4)
    assert found[2]["token_share"] == pytest.approx(3 / 16)
    assert found[2]["load_share"] == pytest.approx((3 + 4 + 3) / 32)
    assert found[2]["contexts"][0] == "[a]bcd"


def test_the_verdict_of_table_9_counts_pure_experts():
    def seed(*purities: float) -> dict[str, Any]:
        return {"experts": [{"purity": p, "token": "x"} for p in purities]}

    assert verdict9({"seeds": [seed(0.9, 0.5, 0.5, 0.1)]})["held"]
    assert not verdict9({"seeds": [seed(0.9, 0.5, 0.5), seed(0.9, 0.5, 0.4)]})["held"]
