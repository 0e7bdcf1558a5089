"""Table 2 of the Switch Transformer: what computes in which precision, and its verdict by hand."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import pytest
import torch

from gatewright.backbones import LanguageModel
from gatewright.experiments import lab, switch_table2
from gatewright.experiments.lab import Arm, Plan
from gatewright.experiments.steps import Stepper
from gatewright.parts.routing import RoutingCall
from tests.experiments.test_paper_arms import Batches
from tests.experiments.test_switch_arms import differing, small


def rounded(*bits: float | None) -> dict[str, Any]:
    return {"seeds": [{"valid_bpb": b} for b in bits]}


def table2(bf16: dict[str, Any], selective: dict[str, Any], ratio: float = 1.0) -> dict[str, Any]:
    arms = {"fp32": rounded(2.0, 2.1), "bf16": bf16, "selective": selective}
    for name, own in arms.items():
        median = ratio if name == "selective" else 1.0
        own["step_time"] = {"median": median, "low": median, "high": median}
        own["cost"] = {"flops": {"router": 5.0, "experts": 95.0}}
    return {"arms": arms}


SHARES = {"bf16": {"share": 0.1}, "selective": {"share": 0.12}}


@pytest.mark.parametrize(
    ("record", "held"),
    [
        (table2(rounded(2.02, 2.12), rounded(2.0, 2.1)), True),
        (table2(rounded(2.02, 2.09), rounded(2.0, 2.1)), False),
        (table2(rounded(2.005, 2.105), rounded(2.0, 2.1)), False),
        (table2(rounded(2.02, None), rounded(2.0, 2.1)), True),
        (table2(rounded(2.1, 2.2), rounded(2.02, 2.12)), False),
        (table2(rounded(2.02, 2.12), rounded(2.0, 2.1), ratio=1.06), False),
        (table2(rounded(2.02, 2.12), rounded(2.0, None)), False),
    ],
    ids=[
        "worse",
        "not in every seed",
        "too little",
        "diverges",
        "both worse",
        "slower",
        "selective diverges",
    ],
)
def test_table_2_asks_for_a_worse_bf16_router_and_a_free_remedy(record: dict[str, Any], held: bool):
    found = switch_table2.table2_verdict(SHARES, record)
    assert found["held"] is held
    assert found["router_share_of_flops"] == pytest.approx(0.05)
    assert switch_table2.recorded_verdict(record | {"verdict": found}) == found
    json.dumps(found, allow_nan=False)


def test_table_2_s_routers_compute_in_what_their_arms_say(monkeypatch: pytest.MonkeyPatch):
    plan = switch_table2.PLAN
    assert differing(plan.arm("bf16"), plan.arm("selective")) == {"router_dtype"}
    assert differing(plan.arm("bf16"), plan.arm("fp32")) == {"router_dtype", "precision"}
    seen: dict[str, set[torch.dtype]] = {}
    for arm in plan.arms[:3]:
        tiny = small(Plan((arm,), arm.name), context=16)
        stepper = Stepper(lab.build(tiny, arm, 17, 0), Batches(), tiny, arm.losses, 0, arm.precision)
        (router,) = stepper.routers.values()
        plain, own = router.route, seen.setdefault(arm.name, set())

        def spy(x: Any, call: RoutingCall, plain: Any = plain, own: Any = own) -> Any:
            routed = plain(x, call)
            own |= {routed.logits.dtype, routed.scores.dtype, routed.assignment.weights.dtype}
            return routed

        monkeypatch.setattr(router, "route", spy)
        own.add(cast(LanguageModel, stepper.model).embedding.weight.dtype)
        loss, _ = stepper.advance()
        assert math.isfinite(loss)
    # The weights themselves stay in fp32.
    assert seen["fp32"] == seen["selective"] == {torch.float32}
    assert seen["bf16"] == {torch.float32, torch.bfloat16}


def test_matrices_multiply_in_the_arm_s_precision(monkeypatch: pytest.MonkeyPatch):
    found = {}
    for precision in ("fp32", "bf16"):
        arm = Arm("one", None, 1, 1, 8, precision=precision)
        tiny = small(Plan((arm,), "one"), context=16)
        stepper = Stepper(lab.build(tiny, arm, 17, 0), Batches(), tiny, {}, 0, arm.precision)
        head, own = stepper.model.head, []
        head.register_forward_hook(lambda *given, own=own: own.append(given[-1].dtype))
        stepper.advance()
        found[precision] = set(own)
    assert found == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}


def test_the_router_s_share_is_its_time_over_the_pass_s(monkeypatch: pytest.MonkeyPatch):
    clock = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(switch_table2.time, "perf_counter", lambda: next(clock))
    total = [0.0]
    add = switch_table2.timed(lambda a, b: a + b, total)
    assert (add(1, b=2), add(3, 4)) == (3, 7)
    assert total == [2.5]
