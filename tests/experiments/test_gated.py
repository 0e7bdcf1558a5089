"""Tables 6, 7 and 9 of 2017: what is counted, when training ends, what is kept, and what their pages say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from gatewright.data import Corpus
from gatewright.data.tokenizer import ByteTokenizer
from gatewright.experiments import gated, gated_experts, gated_tables, registry
from gatewright.experiments.gated import GatedPlan, Model, gate_columns, noisy_gates
from gatewright.experiments.gated_experts import ExpertsPlan
from gatewright.experiments.gated_tables import TABLE6, TABLE7, verdict6, verdict7
from gatewright.papers.sparsely_gated import Settings, build
from scripts import classic_figures
from tests.training.runs import FixedText

TINY: dict[str, Any] = {
    "context": 8,
    "rows": 4,
    "steps": 4,
    "seeds": (0, 1),
    "warmup_steps": 2,
    "evaluations": 2,
    "eval_bytes": 200,
}
SMALL = {"width": 8, "expert_width": 8, "num_experts": 8, "num_selected": 2}


def tiny(plan: GatedPlan) -> GatedPlan:
    """Return a table's plan with models that train in no time."""
    models = []
    for model in plan.models:
        own = {key: value for key, value in SMALL.items() if key != "num_experts"}
        own["num_experts"] = min(model.settings.num_experts, 8)  # type: ignore[type-var]
        if model.settings.gate != "flat":
            own |= {"gate": "groups:4", "num_selected": 4}
        if model.settings.ffn_width:
            own["ffn_width"] = (0, 8)  # type: ignore[assignment]
        models.append(dataclasses.replace(model, settings=dataclasses.replace(model.settings, **own)))
    return dataclasses.replace(plan, models=tuple(models), **TINY)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the default corpus."""
    text = FixedText()
    text.train_tokens = 2000  # type: ignore[attr-defined]
    for module in (gated, gated_experts):
        monkeypatch.setattr(module, "open_corpus", lambda *_, **__: text)


class Routed:
    """A model of one router that says what it is told: counts by mode, importance and load with noise."""

    training = True

    def __init__(self) -> None:
        self.keys: list[int | None] = []
        self.noisy = False

    def routers(self) -> dict[str, Any]:
        return {"only": None}

    def modules(self) -> list[Any]:
        return []

    def eval(self) -> Routed:
        return self.train(False)

    def train(self, mode: bool = True) -> Routed:
        self.training = mode
        return self

    def __call__(self, batch: torch.Tensor, key: Any = None) -> Any:
        assert not self.training
        self.keys.append(None if key is None else int(key))
        counts = torch.tensor([6, 2, 0, 0] if key is None else [3, 3, 1, 1])
        sums = {"importance": torch.tensor([4.0, 2, 1, 1]), "load": torch.tensor([5.0, 1, 1, 1])}
        return SimpleNamespace(stats={"only": SimpleNamespace(sums=sums, counts=counts)})


def test_columns_by_hand():
    net, plan = Routed(), GatedPlan((), context=2, rows=2)
    found = gate_columns(cast(Any, net), {"text": np.arange(13)}, plan)
    assert found is not None
    # Six windows in three batches, with and without noise, every batch with a key of its own.
    assert len(set(net.keys[:3])) == 3
    assert net.keys[3:] == [None] * 3
    # Importance 12, 6, 3, 3: mean 6, variance (36 + 0 + 9 + 9) / 4 = 13.5.
    assert found["cv_importance"] == pytest.approx(13.5**0.5 / 6)
    # Load 15, 3, 3, 3: mean 6, variance (81 + 27) / 4 = 27.
    assert found["cv_load"] == pytest.approx(27**0.5 / 6)
    assert found["max_over_mean"] == pytest.approx(15 / 6)
    assert found["counted_max_over_mean"] == pytest.approx(9 / 6)
    assert found["clean_max_over_mean"] == pytest.approx(18 / 6)
    assert found["idle"] == 2
    assert net.training


def test_gates_draw_noise_while_nothing_else_trains():
    model: Any = build(Settings(dropout=0.5, num_experts=8))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with noisy_gates(model):
        first, again = (model(tokens, key=torch.tensor(1)) for _ in range(2))
        other = model(tokens, key=torch.tensor(2))
        assert torch.equal(first.logits, again.logits)
        assert "load" in first.stats["layers.1.router"].sums
        counts = [one.stats["layers.1.router"].counts.tolist() for one in (first, other)]
        assert counts[0] != counts[1]
        assert not model.layers[1].feed_forward.experts.training
    assert model.training
    dense: Any = build(Settings(moe_layers="none"))
    assert gate_columns(dense, {"text": np.arange(100)}, TABLE6) is None


@pytest.mark.parametrize(
    ("values", "steps", "best"),
    [([9, 8, 7, 6], 8, 8), ([9, 5, 6, 7, 8], 10, 4), ([5, 6, 7, 8], 8, 2), ([9, 5, 6, 6, 4], 10, 10)],
)
def test_training_ends_without_a_new_best_and_the_best_counts(
    fixed: None, monkeypatch: pytest.MonkeyPatch, values: list[float], steps: int, best: int
):
    left, held = iter(values), []

    def measured(net: Any, *_: Any) -> dict[str, float]:
        held.append({name: value.clone() for name, value in net.state_dict().items()})
        return {"perplexity": float(next(left))}

    monkeypatch.setattr(gated, "perplexity", measured)
    plan = dataclasses.replace(
        GatedPlan((), patience=3), **TINY | {"steps": 2 * len(values), "evaluations": len(values)}
    )
    text = cast(Corpus, FixedText())
    net, record = gated.fit(plan, Model("one", Settings(**SMALL)), text, 0)
    assert record["steps"] == steps
    assert len(record["curve"]) == steps // 2
    assert record["cpu_seconds"] > 0
    for name, value in net.state_dict().items():
        assert torch.equal(value, held[best // 2 - 1][name])


def test_the_two_halves_of_the_held_out_text_are_apart():
    text = SimpleNamespace(
        domains=("a",), tokenizer=ByteTokenizer(), valid=lambda _: SimpleNamespace(tokens=np.arange(100))
    )
    halves = [gated.held_out(cast(Corpus, text), 1000, half)["a"].tolist() for half in (0, 1)]
    assert halves == [list(range(50)), list(range(50, 100))]
    assert len(gated.held_out(cast(Corpus, text), 20, 1)["a"]) == 20


def test_a_run_that_diverges_is_said_to(fixed: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gated.Stepper, "advance", lambda self: (setattr(self, "step", 1), float("nan"))[::-1])
    found = gated.train(tiny(TABLE6), tiny(TABLE6).models[0], cast(Corpus, FixedText()), 0)
    assert found == {"seed": 0, "diverged_at": 1, "perplexity": None}
    record = {"rows": {"a": {"seeds": [found]}}, "plan": {"seeds": [0]}}
    assert verdict6(record)["held"] is verdict7(record)["held"] is False


def test_rows_are_run_once_and_kept(fixed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[tuple[str, int]] = []
    train = gated.train

    def spy(plan: Any, model: Model, corpus: Corpus, seed: int, show: Any) -> Any:
        trained.append((model.name, seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(plan, model, corpus, seed, show)

    monkeypatch.setattr(gated, "train", spy)
    plan = dataclasses.replace(tiny(TABLE6), models=tiny(TABLE6).models[:2])
    with pytest.raises(KeyboardInterrupt):
        gated.run_rows(plan, tmp_path, "toy")
    record = gated.run_rows(plan, tmp_path, "toy")
    assert trained == [("0 / 0", 0), ("0 / 0", 1), ("0.2 / 0", 0), ("0.2 / 0", 0), ("0.2 / 0", 1)]
    assert gated.run_rows(plan, tmp_path, "toy") == record
    assert len(trained) == 5


@pytest.mark.parametrize(("table", "quick"), [("table6", True), ("table7", True), ("table9", False)])
def test_a_table_gives_record_page_and_picture(fixed: None, tmp_path: Path, table: str, quick: bool):
    run: Any = getattr(gated_tables, f"run_{table}")
    plans = {"table6": TABLE6, "table7": TABLE7}
    model = Model("one", Settings(**SMALL))
    plan = tiny(plans[table]) if table in plans else ExpertsPlan(models=(model,), strongest=10, **TINY)
    record, page, pictures = run(tmp_path, quick, plan)
    json.dumps(record, allow_nan=False)
    assert record["plan"]["seeds"] == ([0] if quick else [0, 1])
    assert record["verdict"]["sentence"] in page
    assert record["claim"] in page
    (picture,) = pictures.values()
    assert picture.read_bytes().startswith(b"\x89PNG")
    name = f"sparsely_gated-{table}{'-quick' if quick else ''}-rows.png"
    assert f"]({name})" in page
    block = classic_figures.gated_block(record, "x.json")
    assert block.count("\n| ") >= 2
    if table == "table6":
        assert "39.8" in page
        assert "17.8" in page
        assert "first K experts (max / mean 4 = E / K)" in page
    elif table == "table7":
        assert "(46.1)" in page
        assert "(0.774)" in page  # 35.7 / 46.1
        assert "4xLSTM | " in block
    else:
        assert "expert" in page
    for own in record.get("rows", {}).values():
        assert all(f"{seed['perplexity']:.1f}" in page for seed in own["seeds"])


def test_the_plans_are_the_papers_rows():
    names = [model.name for model in TABLE6.models]
    assert names == ["0 / 0", "0.2 / 0", "0 / 0.2", "0.1 / 0.1", "0.01 / 0.01", "1 / 1"]
    for model in TABLE6.models:
        assert model.settings.num_experts == 64
        assert model.settings.num_selected == 4
        weights = f"{model.settings.importance_weight:g} / {model.settings.load_weight:g}"
        assert weights == model.name
    facts = {model.name: gated._facts(TABLE7.settings(model, 1024)) for model in TABLE7.models}
    # Experts 4 x 2 x 64 x 128, LSTMs 2 x 4 x 64 x 128: the paper's, an eighth as wide.
    for name in gated_tables.MATCHED:
        assert facts[name]["operations"] == 2 * 65_536, name
    assert facts["MoE-4"]["operations"] == 2 * 65_536 + 2 * 4 * 64
    assert facts["MoE-256-h"]["operations"] == 2 * 65_536 + 2 * (16 + 2 * 16) * 64
    for plan in (TABLE6, TABLE7, gated_experts.PLAN):
        assert plan.seeds == (0, 1)
    assert {"sparsely_gated/table6", "sparsely_gated/table7", "sparsely_gated/table9"} <= {*registry.TARGETS}


def row(perplexity: float, importance: float, load: float, peak: float) -> dict[str, Any]:
    gates = {"cv_importance": importance, "cv_load": load, "max_over_mean": peak}
    return {"seeds": [{"perplexity": perplexity, "gates": gates}]}


# The paper's own figures, with w = 0.01's importance as printed.
PAPER = {model.name: row(*model.paper.values()) for model in TABLE6.models}


@pytest.mark.parametrize(
    ("changes", "held", "directions"),
    [
        ({}, True, True),
        ({"0 / 0": row(39.8, 3, 3, 4.9)}, False, True),
        ({"0 / 0": row(35.65, 3, 3, 17)}, False, True),
        ({"0.01 / 0.01": row(35.7, 0.6, 0.1, 1.37)}, False, True),
        ({"1 / 1": row(36.5, 0.03, 0.02, 1.07)}, False, True),
        ({"1 / 1": row(35.7, 0.03, 0.02, 1.2)}, True, False),
        ({"0.2 / 0": row(35.6, 0.06, 0.03, 1.47)}, True, False),
    ],
    ids=["the paper's", "even", "as good", "uneven", "apart", "not more even", "load as even"],
)
def test_the_verdict_of_table_6_asks_for_all_four_goals(
    changes: dict[str, Any], held: bool, directions: bool
):
    found = verdict6({"rows": PAPER | changes})
    assert found["held"] is held
    assert all(found["directions"].values()) is directions
    assert found["sentence"].startswith("held" if held else "did not hold")


@pytest.mark.parametrize(
    ("four", "thirty_two", "held"), [(45.0, 39.7, True), (39.0, 39.7, False), (45.0, 35.0, False)]
)
def test_the_verdict_of_table_7_asks_for_a_fall_and_a_tenth(four: float, thirty_two: float, held: bool):
    rows = {model.name: row(model.paper["perplexity"], 0, 0, 0) for model in TABLE7.models}
    rows |= {"MoE-4": row(four, 0, 0, 0), "MoE-32": row(thirty_two, 0, 0, 0)}
    record = {"rows": rows, "plan": {"seeds": [0]}}
    assert verdict7(record)["held"] is held
    # 1 - 35.7 / 45.7 = 21.9 %, against the best of the three.
    assert verdict7(record)["below_best_matched"] == [pytest.approx(1 - 35.7 / 45.7)]
    rows["4xLSTM"] = row(39.0, 0, 0, 0)
    assert not verdict7(record)["held"]
