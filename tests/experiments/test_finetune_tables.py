"""switch/table4 and table8: what is trained, kept and concluded."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any, cast

import pytest

from gatewright.data import Corpus
from gatewright.data.tasks import Task
from gatewright.experiments import finetune_runs
from gatewright.experiments.finetune_runs import quick_form, run_plan
from gatewright.experiments.finetune_tables import (
    DENSE,
    EVEN,
    EXPERT,
    PAPER4,
    PAPER8,
    STUDENT,
    TABLE4,
    TABLE8,
    THREE,
    TUNED,
    TWO,
    run_table4,
    run_table8,
    verdict4,
    verdict8,
)
from gatewright.experiments.t_test import paired, quantile
from gatewright.papers.switch import Settings
from gatewright.training.distiller import digest_of
from gatewright.training.finetuner import FineTuner, TaughtFineTuner
from gatewright.training.interrupt import StopRequest
from gatewright.training.trainer import Trainer
from tests.training.runs import FixedText
from tests.training.test_finetuner import hand_task

TEXT = cast(Corpus, FixedText())
TINY = Settings(width=16, num_heads=2, head_dim=8, num_experts=4, expert_width=16, ffn_width=16, context=32)
SMALL: dict[str, Any] = {
    "model": TINY,
    "tokens": 256,
    "batch_tokens": 64,
    "warmup_steps": 4,
    "steps": 4,
    "rows": 4,
    "evaluations": 2,
    "eval_bytes": 100,
    "tasks": ("hand",),
    "tokenizer": "bytes",
}
PLAN4 = dataclasses.replace(TABLE4, seeds=(0, 1), **SMALL)
PLAN8 = dataclasses.replace(TABLE8, seeds=(0,), **SMALL)


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the default corpus and the real tasks."""
    monkeypatch.setattr(finetune_runs, "open_corpus", lambda *_, **__: TEXT)
    monkeypatch.setattr(finetune_runs, "open_task", lambda *_, **__: hand_task())


def silent(share: float, state: str) -> None:
    """Show nothing."""


def test_models_are_trained_once_and_a_stopped_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    advance = Trainer.advance

    def counted(self: Trainer) -> Any:
        steps.append(self.name)
        if len(steps) == 14:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", counted)
    with pytest.raises(KeyboardInterrupt):
        run_plan(PLAN4, tmp_path, silent, StopRequest())
    # Four steps for each model on text and for the dense side; of the second side the second was not taken.
    assert steps == ["model"] * 8 + [DENSE.name] * 4 + [EVEN.name] * 2
    record = run_plan(PLAN4, tmp_path, silent, StopRequest())
    assert len(steps) == 14 + 4 * 9
    assert run_plan(PLAN4, tmp_path, silent, StopRequest()) == record
    assert len(steps) == 50
    # Nothing but the two models on text stays; other steps are other fine-tunings of the same ones.
    assert not list((tmp_path / "tuned").iterdir())
    run_plan(dataclasses.replace(PLAN4, seeds=(2,), sides=(EVEN,)), tmp_path, silent, StopRequest())
    assert len(steps) == 54
    for own in record["sides"].values():
        assert [seed["seed"] for seed in own["hand"]] == [0, 1]


def test_sides_are_the_paper_s_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert [(s.sparse, s.dropout, s.expert_dropout) for s in TABLE4.sides] == [
        (False, 0.1, 0.0),
        (True, 0.1, 0.1),
        (True, 0.2, 0.2),
        (True, 0.3, 0.3),
        (True, 0.1, 0.4),
    ]
    assert list(PAPER4) == [side.name for side in TABLE4.sides]
    assert statistics.fmean(PAPER4[EXPERT.name]) - statistics.fmean(PAPER4[EVEN.name]) == pytest.approx(0.25)
    assert list(PAPER8) == [side.name for side in TABLE8.sides]
    assert PAPER8[STUDENT.name][0] == pytest.approx(74.6 + 0.3 * (81.3 - 74.6), abs=0.05)
    assert TABLE4.seeds == TABLE8.seeds == (0, 1, 2)
    made: list[Any] = []
    inner = FineTuner.__init__

    def noted(self: FineTuner, run: Any, *rest: Any) -> None:
        inner(self, run, *rest)
        sparse = any(hasattr(own, "num_experts") for own in self.model.modules())
        made.append((self.name, sparse, self.settings.dropout, self.settings.expert_dropout))
        assert self.settings.capacity_factor is None

    monkeypatch.setattr(FineTuner, "__init__", noted)
    run_plan(dataclasses.replace(PLAN4, seeds=(0,)), tmp_path, silent, StopRequest())
    assert made == [(s.name, s.sparse, s.dropout, s.expert_dropout) for s in TABLE4.sides]


def test_the_student_is_the_dense_twin_taught_by_the_fine_tuned_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    taught: list[TaughtFineTuner] = []
    bench = finetune_runs.Bench(PLAN8, TEXT, tmp_path, StopRequest())
    tuner = finetune_runs.Bench.tuner

    def noted(self: Any, side: Any, task: Task, seed: int, teacher: Any = None) -> Any:
        made = tuner(self, side, task, seed, teacher)
        taught.extend([made] if isinstance(made, TaughtFineTuner) else [])
        return made

    monkeypatch.setattr(finetune_runs.Bench, "tuner", noted)
    record = run_plan(PLAN8, tmp_path, silent, StopRequest())
    (student,) = taught
    assert student.teacher_weight == 0.25
    for sparse in (True, False):
        bench.pretrained(sparse, silent)
    assert student.start_digest == tuner(bench, DENSE, hand_task(), 0).start_digest
    # The teacher's checkpoint stays; what it scored on the test texts is what the record says.
    teacher = tuner(bench, EXPERT, hand_task(), 0)
    folder = bench._folder(EXPERT, hand_task(), 0)
    assert list((tmp_path / "tuned").iterdir()) == [folder]
    held = finetune_runs.newest_checkpoint(folder)
    assert held is not None
    teacher.restore(held)
    assert student.teacher_digest == digest_of(teacher.model) != teacher.start_digest
    assert teacher.score("test").nats == pytest.approx(record["sides"][EXPERT.name]["hand"][0]["nats"])
    sizes = [own["hand"][0]["parameters"] for own in record["sides"].values()]
    assert sizes[0] == sizes[2] < sizes[1]


def hand_record(scores: dict[str, list[list[float]]]) -> Any:
    """Return a record of two tasks; `scores` holds per cents by side, task and seed."""
    sides = {
        side: {
            task: [{"accuracy": p / 100, "nats": 2 - p / 100, "parameters": 10} for p in own]
            for task, own in zip(("one", "two"), rows, strict=True)
        }
        for side, rows in scores.items()
    }
    return {"tasks": {"one": {}, "two": {}}, "sides": sides}


def table4(expert: Any = ([72, 71, 73], [52, 53, 51]), three: float = 65, dense: float = 60) -> Any:
    flat = lambda value: [[value] * 3, [value - 20] * 3]  # noqa: E731
    return hand_record(
        {DENSE.name: flat(dense), EVEN.name: flat(70), TWO.name: flat(69), THREE.name: flat(three),
         EXPERT.name: list(expert)}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "missed"),
    [
        (table4(), ""),
        # +2, -3, +2, +1, -2, +3: above on average, not beyond chance.
        (table4(([72, 67, 72], [51, 48, 53])), "0.4 inside the experts above 0.1, interval above 0"),
        (table4(three=75), "0.4 inside the experts is the best row of Switch; 0.3 in all places below 0.1"),
        (table4(dense=71), "Switch with 0.1 above the dense twin"),
    ],
    ids=["held", "chance", "three", "dense"],
)
def test_table_4_s_verdict_names_what_was_missed(record: Any, missed: str):
    found = verdict4(record)
    assert "; ".join(goal for goal, own in found["goals"].items() if not own) == missed
    assert found["held"] is (not missed)
    assert found["sentence"].startswith("did not hold" if missed else "held")


ABOVE = "the teacher above the dense twin, interval above 0"


@pytest.mark.parametrize(
    ("teacher", "student", "missed", "kept"),
    [
        (70, 63, "", 30),
        (70, 61, "the student keeps at least 15 % of the gain", 10),
        (60, 63, f"{ABOVE}; the student keeps at least 15 % of the gain", None),
    ],
)
def test_table_8_s_verdict(teacher: float, student: float, missed: str, kept: float | None):
    rows = {DENSE.name: 60.0, EXPERT.name: teacher, STUDENT.name: student}
    found = verdict8(hand_record({name: [[p, p, p], [p, p, p]] for name, p in rows.items()}))
    assert "; ".join(goal for goal, own in found["goals"].items() if not own) == missed
    # Nats are 2 - p / 100 here, so that the same share is kept of them.
    for key in ("gain_kept_percent", "nats_kept_percent"):
        assert found[key] == (None if kept is None else pytest.approx(kept))


def test_intervals_are_student_s():
    # Two-sided 95 %: 12.706, 4.303, 2.201 of 1, 2 and 11 degrees.
    assert [round(quantile(degrees), 3) for degrees in (1, 2, 11)] == [12.706, 4.303, 2.201]
    # Mean 2, standard deviation 1: 2 -+ 4.303 / sqrt(3).
    found = paired([1, 2, 3])
    assert found == (2, pytest.approx(2 - 2.4843, abs=1e-3), pytest.approx(2 + 2.4843, abs=1e-3))
    assert paired([1.5]) == (1.5, None, None)
    assert found.told() == "+2.00 (-0.48 to +4.48)"


def test_pages_show_every_seed_beside_the_paper_s(tmp_path: Path):
    for run, plan, paper in ((run_table4, PLAN4, PAPER4), (run_table8, PLAN8, PAPER8)):
        record, page, pictures = run(tmp_path / plan.target[-1], False, plan)
        for side, own in record["sides"].items():
            scores = ", ".join(f"{100 * seed['accuracy']:.1f}" for seed in own["hand"])
            assert f"| {side} | {scores} |" in page
            assert " / ".join(f"{score:.1f}" for score in paper[side]) in page
        assert record["verdict"]["sentence"] in page
        assert pictures["rows"].read_bytes().startswith(b"\x89PNG")


def test_the_quick_form_is_shorter():
    quick = quick_form(TABLE4)
    assert quick.tokens * 4 == TABLE4.tokens
    assert (quick.seeds, quick.steps) == ((0,), TABLE4.steps // 2)
    assert quick.sides == TABLE4.sides
    assert set(TUNED) == {"switch/table4", "switch/table8"}


def test_twins_and_sides_have_rates_of_their_own_and_the_page_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[str, float]] = []
    advance = Trainer.advance

    def noted(self: Trainer) -> Any:
        if self.step == 0:
            seen.append((self.name, self.run.learning_rate))
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", noted)
    sides = (dataclasses.replace(DENSE, learning_rate=0.005), EVEN, TWO, THREE, EXPERT)
    plan = dataclasses.replace(PLAN4, seeds=(0,), sides=sides, dense_pretraining_rate=0.004)
    _, page, _ = run_table4(tmp_path, False, plan)
    assert seen[:4] == [("model", 0.012), ("model", 0.004), (DENSE.name, 0.005), (EVEN.name, 0.008)]
    assert "(AdamW at 0.012 for the sparse one; 0.004 for its twin)" in page
    assert f"AdamW at 0.005 for {DENSE.name}; 0.008 for {EVEN.name} and " in page
    plain = dataclasses.replace(plan, sides=TABLE4.sides, dense_pretraining_rate=None)
    _, page, _ = run_table4(tmp_path / "plain", False, plain)
    assert (
        "(AdamW at 0.012). Then each side on each task: 4 steps of 4 texts, AdamW at 0.008, the best" in page
    )
