"""A training step is timed whole and by part: a backward node belongs to the part that made it, floors are
worked by hand, goals follow from ratios.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.backbones import Block, Decoder
from gatewright.data import open_corpus
from gatewright.errors import RunFailure, UserError
from gatewright.measuring import StepRun, bench_step
from gatewright.measuring import step as step_module
from gatewright.measuring.parts import MARK, labelled, model_labels, sum_parts, time_parts
from gatewright.measuring.step_floor import Work, floor_seconds, work_of_parts
from gatewright.measuring.step_result import StepResult, size_lines, step_goals
from gatewright.papers.mixtral import Settings, build
from gatewright.parts import MLP, MoELayer
from gatewright.training import TrainRun
from gatewright.training.trainer import Trainer
from tests.measuring.samples import MACHINE
from tests.training.runs import write_text


@dataclass
class Range:
    start: float
    end: float

    def elapsed_us(self) -> float:
        return self.end - self.start


@dataclass
class Event:
    """What sum_parts reads of a profiler's event; times in microseconds."""

    name: str
    time_range: Range
    cpu_parent: Event | None = None
    sequence_nr: int = -1
    scope: int = 0


def event(name: str, start: float, end: float, parent: Event | None = None, number: int = -1, scope: int = 0):
    return Event(name, Range(start, end), parent, number, scope)


def test_a_moment_belongs_to_its_innermost_label_and_a_node_to_its_maker():
    step = event(MARK + "rest", 0, 1000)
    attention = event(MARK + "attention", 100, 500, step)
    query = event("aten::linear", 110, 210, attention)
    mm = event("aten::mm", 120, 200, query, number=7)
    soft = event("aten::softmax", 300, 400, attention, number=8)
    # A linear map outside of every module is the head's; what stands inside a map is no further map.
    head = event("Maps", 540, 590, step)
    inside = event("gatewright::maps_forward", 545, 585, head)
    # Of two operators with one number the later made the node: the earlier only stood before it.
    view = event("aten::view", 520, 530, step, number=8)
    back = [
        event("autograd::engine::evaluate_function: MmBackward0", 600, 660, step, number=7, scope=1),
        event("autograd::engine::evaluate_function: ViewBackward0", 660, 670, step, number=8, scope=1),
        event("autograd::engine::evaluate_function: AccumulateGrad", 670, 690, step),
    ]
    inner = event("MapsBackward", 605, 655, back[0], number=9)
    times = sum_parts([step, attention, query, mm, soft, view, head, inside, *back, inner], steps=2)
    micro = {part: {way: round(2e6 * own[way], 3) for way in own} for part, own in times.items()}
    assert micro["projections"] == {"forward": 100, "backward": 60}
    assert micro["attention"] == {"forward": 300, "backward": 0}
    assert micro["head"] == {"forward": 50, "backward": 0}
    assert micro["rest"] == {"forward": 1000 - 400 - 50 - 90, "backward": 30}
    assert sum(sum(own.values()) for own in micro.values()) == 1000


def test_labels_are_taken_off_again():
    layer = MLP(4, 8)
    with pytest.raises(TypeError), labelled(layer, "forward", "dense_ffn"):
        layer()
    assert "forward" not in vars(layer)
    with labelled(layer, "forward", "dense_ffn"):
        assert "forward" in vars(layer)
    layer.own = print
    with labelled(layer, "own", "rest"):
        assert layer.own is not print
    assert layer.own is print


def small(**changes: Any) -> tuple[Settings, Decoder]:
    shape = {"vocab_size": 11, "width": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "context": 5}
    experts = {"num_experts": 4, "num_selected": 2, "expert_width": 6, "ffn_width": 12}
    settings = Settings(**{**shape, **experts, **changes})
    model = build(settings)
    assert isinstance(model, Decoder)
    return settings, model


def test_parts_of_a_real_step_add_up_to_it():
    _, model = small(moe_layers="last:1", context=64, width=64, head_dim=32, expert_width=64, ffn_width=128)
    tokens = torch.randint(11, (8, 64))

    def step() -> None:
        output = model(tokens, key=torch.tensor(1))
        output.logits.logsumexp(-1).sum().backward()

    step()
    times = time_parts(step, 2, model_labels(model))
    whole = sum(sum(own.values()) for own in times.values())
    for part in ("embedding", "norms", "projections", "attention", "experts", "dense_ffn", "head"):
        assert times[part]["forward"] > 0, part
        assert 0 < times[part]["backward"] < whole, part
    assert times["router"]["backward"] > 0
    assert times["shared_experts"] == {"forward": 0, "backward": 0}
    # Nothing is counted twice and nothing is left out: a second profile sees about the same whole.
    again = time_parts(step, 2, [])
    assert again["rest"]["forward"] + again["rest"]["backward"] == pytest.approx(whole, rel=0.8)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_work_of_parts_by_hand():
    _, model = small()
    found = work_of_parts(model, tokens=10, dtype="bf16", averaged=True)
    assert "dense_ffn" not in found
    assert "shared_experts" not in found
    # Two layers: query 8x8, key and value 4x8 each, output 8x8 = 192 numbers; 2 FLOPs each, three passes.
    assert found["projections"].flops == 3 * 10 * 2 * (2 * 192)
    # Heads and key/value heads of 4 numbers: (2 + 1) 4 in each layer; in, out, and x twice, in bf16.
    assert found["projections"].moved == 3 * (10 * 2 * 2 * (2 * 12 + 2 * 8) + 4 * 2 * 192)
    assert found["experts"].flops == 3 * 10 * 2 * 2 * (2 * 3 * 6 * 8)
    assert found["experts"].moved == 2 * (2 * 3 * 10 * 8 * 2) + 3 * 4 * 2 * 4 * (3 * 6 * 8)
    assert found["router"] == Work(3 * 10 * 2 * (2 * 4 * 8), 3 * 4 * 10 * (2 * 8 + 2 * 4), "fp32")
    assert found["loss"] == Work(0, 3 * 10 * 11 * 2, "bf16")
    total = sum(p.numel() for p in model.parameters())
    assert found["optimizer"].moved == 4 * total * 10
    assert work_of_parts(model, 10, "fp32", averaged=False)["optimizer"].moved == 4 * total * 8
    assert sum(w.flops for w in found.values()) > 0
    _, dense = small(moe_layers="none")
    assert work_of_parts(dense, 10, "fp32", averaged=False)["dense_ffn"].flops == 3 * 10 * 2 * (
        2 * 3 * 12 * 8
    )


def test_a_floor_is_the_longer_of_matmuls_and_bytes():
    # 100 FLOP/s in fp32, 200 in bf16, 10 bytes/s.
    assert floor_seconds(Work(1000, 50, "fp32"), MACHINE) == 10
    assert floor_seconds(Work(1000, 80, "bf16"), MACHINE) == 8


def row(over: float = 1.1, sparse: float | None = 1.6, dense: float | None = 1.4, refused: str | None = None):
    def ratio(value: float | None) -> dict[str, float] | None:
        return None if value is None else {"median": value, "low": value - 0.1, "high": value + 0.1}

    part = {"forward": 0.001, "backward": 0.002, "floor": 0.0015}
    return {
        "precision": "fp32",
        "refused": refused,
        "ratios": {
            "sparse_over_dense": ratio(over),
            "sparse_gain": ratio(sparse),
            "dense_gain": ratio(dense),
        },
        "step_seconds": {"sparse": ratio(0.2), "dense": ratio(0.2)},
        "sides": {
            "sparse": {"parts": {"experts": part, "rest": {**part, "floor": None}}},
            "dense": {"parts": {"dense_ffn": part}},
        },
    }


def test_goals_and_the_table():
    assert [goal["held"] for goal in step_goals(row())] == [True, True, False]
    assert [goal["held"] for goal in step_goals(row(1.21, None, 1.5))] == [False, None, True]
    assert [goal["held"] for goal in step_goals(row(refused="busy"))] == [None] * 3
    result = StepResult({"rows": [row()], "goals": step_goals(row())}, ("step.json",))
    text = result.to_text()
    assert "sparse over dense 1.10 (1.00 to 1.20); over torch's own operators: sparse 1.60" in text
    assert [line.split() for line in text.splitlines() if line.startswith("  experts")] == [
        ["experts", "1.00", "+", "2.00", "2.0", "-", "-"]
    ]
    assert "  not held fp32: a dense step at least 1.5 times" in text
    assert "memory" not in text
    result.check()
    with pytest.raises(RunFailure, match="fp32: busy; run again"):
        StepResult({"rows": [row(refused="busy")], "goals": []}, ()).check()


def test_memory_and_tokens_per_expert_are_told():
    own = row()
    own["sides"]["sparse"] |= {"tokens_per_expert": 256.0, "memory": None}
    own["sides"]["dense"]["memory"] = {"peak": 3 << 20, "floor": 2 << 20, "over_floor": 1.5}
    assert size_lines(own) == [
        "  sparse: 256 tokens per expert and step",
        "  sparse: the process whose memory was measured died",
        "  dense: peak memory 3 MiB, 1.50 times its floor of 2 MiB",
    ]


def test_compiled_sides_are_told_with_what_they_take_at_first():
    own = row()
    own["start_seconds"] = {"dense_compiled": 31.4}
    own["ratios"]["dense_compiled"] = {"median": 1.25, "low": 1.0, "high": 1.5}
    line = "  dense compiled: 1.25 (1.00 to 1.50) times the time of a step that is not, and 31 s at first"
    assert size_lines(own) == [line]


def test_every_block_of_a_compiled_side_is_compiled_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The compiler itself cannot see through this test run's shape checks: who is asked, and when, is tested.
    asked: list[Block] = []
    monkeypatch.setattr(Block, "compile", lambda self: asked.append(self))
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    settings, _ = small(context=16, num_layers=3)
    data = tuple(write_text(tmp_path / "text"))
    own = TrainRun(model=settings, data=data, batch_tokens=64, tokens=640)
    corpus = open_corpus(data, cache=tmp_path / "cache")
    trainer, seconds = step_module._compiled(own, corpus, "sparse")
    eager = Trainer(own, corpus, "sparse")
    eager.advance()
    assert seconds > 0
    assert trainer.advance()["loss"] == pytest.approx(eager.advance()["loss"], rel=1e-4)
    assert asked == list(trainer.model.layers)


def test_a_whole_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(step_module, "measure_machine", lambda *_: MACHINE)
    monkeypatch.setattr(step_module, "WARM_UPS", 1)
    monkeypatch.setattr(step_module, "PROFILED", 1)
    settings, _ = small(context=16)
    run = StepRun(
        model=settings,
        data=tuple(write_text(tmp_path / "text")),
        batch_tokens=64,
        steps=1,
        rounds=11,
        out=str(tmp_path / "out"),
    )
    lines: list[str] = []
    result = bench_step(run, lines.append)
    record = json.loads((tmp_path / "out" / "step.json").read_text())
    assert [row["precision"] for row in record["rows"]] == ["fp32", "bf16"]
    for own in record["rows"]:
        names = {"sparse", "dense"}
        assert set(own["sides"]) == names
        plain = {f"{name}_plain" for name in names} if own["ratios"]["sparse_gain"] else set()
        assert set(own["seconds"]) == names | plain
        assert all(len(taken) == 11 for taken in own["seconds"].values())
        assert own["sides"]["sparse"]["total_parameters"] > own["sides"]["sparse"]["active_parameters"]
        assert own["sides"]["sparse"]["parts"]["optimizer"]["forward"] > 0
        assert own["sides"]["sparse"]["parts"]["loss"]["backward"] > 0
        assert "router" not in own["sides"]["dense"]["parts"]
        # 64 tokens, 2 of 4 experts each.
        assert own["sides"]["sparse"]["tokens_per_expert"] == 32
        assert own["sides"]["dense"]["tokens_per_expert"] is None
    assert len(record["goals"]) == 6
    assert [Path(file).name for file in result.files] == ["step.json", "step-fp32.png", "step-bf16.png"]
    assert all(Path(file).is_file() for file in result.files)


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"rounds": 3}, "rounds 3"), ({"steps": 0}, "steps 0"), ({"precisions": ()}, "precisions is empty")],
)
def test_what_says_nothing_is_refused(changes: dict[str, Any], match: str):
    with pytest.raises(UserError, match=match):
        StepRun(**changes)


def test_a_model_without_sparse_layers_has_no_twin(tmp_path: Path):
    settings, model = small(moe_layers="none")
    assert not any(isinstance(module, MoELayer) for module in model.modules())
    with pytest.raises(UserError, match="no sparse layer"):
        bench_step(StepRun(model=settings, out=str(tmp_path)), lambda _: None)
