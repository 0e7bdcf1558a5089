"""Sweeps over the papers' own runs: translation, fine-tuning, distillation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest

from gatewright.data import Corpus
from gatewright.experiments import distill_rates, finetune_runs, gshard_rates, gshard_runs, tuning_rates
from gatewright.experiments.distill_rates import run_distill_rates
from gatewright.experiments.finetune_tables import DENSE, EVEN, EXPERT
from gatewright.experiments.gshard_rates import run_gshard_rates
from gatewright.experiments.gshard_runs import SPARSE, TWIN
from gatewright.experiments.rates import MEASURES, RATES, SEED, rates_of, rates_page
from gatewright.experiments.tuning_rates import SWEPT, run_text_rates, run_tuning_rates
from gatewright.training.finetuner import FineTuner
from gatewright.training.pairs import PairTrainer
from gatewright.training.trainer import Trainer
from tests.experiments import gshard_words, test_distill_tables, test_finetune_tables
from tests.training.runs import FixedText
from tests.training.test_finetuner import hand_task

TEXT = cast(Corpus, FixedText())


def test_translation_s_two_systems_are_trained_at_every_rate_and_judged_by_the_last_dev_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rates: list[tuple[float, int]] = []
    begin = PairTrainer.__init__

    def noted(self: PairTrainer, model: Any, objective: Any, stream: Any, run: Any) -> None:
        rates.append((run.learning_rate, run.seed))
        begin(self, model, objective, stream, run)

    monkeypatch.setattr(gshard_rates, "open_sources", lambda plan, say: gshard_words.sources())
    monkeypatch.setattr(PairTrainer, "__init__", noted)
    monkeypatch.setattr(gshard_runs, "write_texts", None)  # nothing is translated
    record, page, _ = run_gshard_rates(tmp_path, False, gshard_words.TINY)
    assert rates == [(rate, SEED) for rate in RATES for _ in (TWIN, SPARSE)]
    assert list(record["arms"]) == [TWIN, SPARSE]
    assert record["baseline"] == TWIN
    for name, own in record["arms"].items():
        assert [one["learning_rate"] for one in own] == list(RATES)
        for one in own:
            file = tmp_path / f"{name}-{one['learning_rate']:g}.json".replace(" ", "")
            curve = json.loads(file.read_text(encoding="utf-8"))["record"]["train"]["curve"]
            assert one["dev_nats"] == curve[-1]["dev"] != curve[0]["dev"]
    assert len({one["dev_nats"] for own in record["arms"].values() for one in own}) == 8
    assert f"| {MEASURES['dev_nats']} at | 0.0015 | 0.003 | 0.006 | 0.012 |" in page
    assert "`gshard/quality`, 6 steps of 6 pairs, seed 4" in page
    assert rates_page(record) == page


def test_a_finished_sweep_of_translation_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gshard_rates, "open_sources", lambda plan, say: gshard_words.sources())
    first, _, _ = run_gshard_rates(tmp_path, False, gshard_words.TINY)

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(gshard_rates, "run_model", never)
    again, _, _ = run_gshard_rates(tmp_path, False, gshard_words.TINY)
    assert again["arms"] == first["arms"]


def test_fine_tunings_share_two_models_and_each_side_has_every_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(finetune_runs, "open_corpus", lambda *_, **__: TEXT)
    monkeypatch.setattr(finetune_runs, "open_task", lambda *_, **__: hand_task())
    tuned: list[float] = []
    texts: list[str] = []
    begin = Trainer.__init__

    def noted(self: Trainer, run: Any, *more: Any, **other: Any) -> None:
        (tuned if isinstance(self, FineTuner) else texts).append(run.learning_rate)
        begin(self, run, *more, **other)

    monkeypatch.setattr(Trainer, "__init__", noted)
    plan = dataclasses.replace(SWEPT, **test_finetune_tables.SMALL)
    record, page, _ = run_tuning_rates(tmp_path, False, plan)
    assert tuned == [rate for rate in tuning_rates.RATES for _ in range(3)]
    assert set(texts) == {plan.pretraining_rate}
    assert list(record["arms"]) == list(tuning_rates.SIDES)
    assert list(tuning_rates.SIDES.values()) == [DENSE, EVEN, EXPERT]
    assert record["shared"] == 2e-3
    for own in record["arms"].values():
        assert [one["learning_rate"] for one in own] == list(tuning_rates.RATES)
        assert all(0 <= one["dev_error"] <= 100 and one["nats"] > 0 for one in own)
    assert rates_page(record) == page
    assert "4 steps of 4 texts of each of 1 tasks" in page


def test_quick_forms_take_every_other_rate_and_the_one_that_sides_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(finetune_runs, "open_corpus", lambda *_, **__: TEXT)
    monkeypatch.setattr(finetune_runs, "open_task", lambda *_, **__: hand_task())
    monkeypatch.setattr(distill_rates, "open_corpus", lambda *_, **__: TEXT)
    plan = dataclasses.replace(SWEPT, **{**test_finetune_tables.SMALL, "tokens": 1024})
    tuning, page, _ = run_tuning_rates(tmp_path / "tuning", True, plan)
    assert "| 0.0005 | 0.002 | 0.008 |" in page
    distill, page, _ = run_distill_rates(
        tmp_path / "distill", True, dataclasses.replace(test_distill_tables.PLAN6, tokens=1024)
    )
    assert "| 0.0015 | 0.006 | 0.024 |" in page
    for record in (tuning, distill):
        assert record["quick"]
        assert record["shared"] in [own["learning_rate"] for own in next(iter(record["arms"].values()))]


def test_both_models_are_trained_on_text_at_every_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning_rates, "open_corpus", lambda *_, **__: TEXT)
    seen: list[tuple[float, int, bool]] = []
    advance = Trainer.advance

    def noted(self: Trainer) -> Any:
        seen.append((self.run.learning_rate, self.run.seed, self.run.model.moe_layers != "none"))
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", noted)
    plan = dataclasses.replace(SWEPT, **test_finetune_tables.SMALL)
    record, page, _ = run_text_rates(tmp_path, False, plan)
    assert seen[::4] == [
        (rate, SEED, sparse) for rate in rates_of("switch/text-rates") for sparse in (False, True)
    ]
    assert len({one["valid_bpb"] for own in record["arms"].values() for one in own}) == 10
    assert record["shared"] == 3e-3
    assert rates_page(record) == page
    assert "256 tokens of text in batches of 64, seed 4" in page


def test_dev_texts_that_are_wrong_by_hand():
    found = tuning_rates._dev([{"accuracy": 0.5, "nats": 1.0}, {"accuracy": 0.75, "nats": 2.0}])
    assert found == {"dev_error": 37.5, "nats": 1.5}
    assert tuning_rates._dev([{"accuracy": 0.5, "nats": float("nan")}])["dev_error"] is None


def test_distillation_s_dense_model_and_teacher_have_every_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distill_rates, "open_corpus", lambda *_, **__: TEXT)
    seen: list[tuple[float, int, int]] = []
    begin = Trainer.__init__

    def noted(self: Trainer, run: Any, *more: Any, **other: Any) -> None:
        seen.append((run.learning_rate, run.seed, run.model.num_experts))
        begin(self, run, *more, **other)

    monkeypatch.setattr(Trainer, "__init__", noted)
    plan = test_distill_tables.PLAN6
    record, page, _ = run_distill_rates(tmp_path, False, plan)
    wanted = rates_of("switch/distill-rates")
    assert [own[:2] for own in seen] == [(rate, SEED) for rate in wanted for _ in range(2)]
    assert [own[2] for own in seen[1::2]] == [4] * len(wanted)
    assert len({one["valid_bpb"] for own in record["arms"].values() for one in own}) == 10
    assert rates_page(record) == page
    assert "256 tokens in batches of 64, seed 4" in page
    run_distill_rates(tmp_path, False, plan)
    assert len(seen) == 10
