"""sparsely_gated/translation on a few words: equal shares, kept models, verdict, page, and no leak."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gatewright.evaluation.bleu import Bleu
from gatewright.experiments import translation, translation_runs
from gatewright.experiments.translation import run_translation, verdict
from gatewright.experiments.translation_page import PAPER_BLEU
from gatewright.experiments.translation_runs import CATALOGS, DENSE, MOE, PLAN, SINGLE, VERSES, lines_of
from gatewright.papers.sparsely_gated_mt import Settings

WORDS = {
    "en": "one two three four five six seven eight nine ten".split(),
    "es": "uno dos tres cuatro cinco seis siete ocho nueve diez".split(),
    "fr": "un deux trois quatre cinq six sept huit neuf dix".split(),
}
TEXTS = {name: [f"{a} {b} {c}" for a in own for b in own for c in own[:3]] for name, own in WORDS.items()}
# Short lines of the same words, and one that is a verse too.
SHORT = {
    name: [f"{a} {b}" for a in own for b in own] + [TEXTS[name][7]] for name, own in WORDS.items()
}  # fmt: skip
KINDS = {VERSES: TEXTS, CATALOGS: SHORT}
TINY = replace(
    PLAN, languages=("es", "fr"), pieces=280, longest=30, held_out=0.1, test_lines=2, rows=4, steps=8,
    warmup_steps=2, beams=1, seeds=(0,), model=Settings(width=16, num_experts=4, expert_width=8, num_tags=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, dict[str, Path], Path]:
    """The whole experiment on counting words."""
    work = tmp_path_factory.mktemp("work")
    patch = pytest.MonkeyPatch()
    patch.setattr(translation, "open_lines", lambda plan, say: lines_of(plan, KINDS))
    record, page, pictures = run_translation(work, False, TINY)
    patch.undo()
    return record, page, pictures, work


def test_every_system_trains_on_as_many_pairs_and_translates_every_pair(done: Any):
    record, page, pictures, _ = done
    systems = record["systems"]
    assert list(systems) == [MOE, DENSE, SINGLE]
    assert {own["seeds"][0]["train"]["steps"] for own in systems.values()} == {8}
    pairs = ["es-en", "fr-en", "en-es", "en-fr"]
    assert [list(own["seeds"][0]["pairs"]) for own in systems.values()] == [pairs] * 3
    assert [len(own["seeds"][0]["losses"]) for own in systems.values()] == [1, 1, 4]
    # The dense layers have the operations of 2 experts and of two gates of 4 logits.
    assert systems[MOE]["operations"] == systems[DENSE]["operations"] == systems[SINGLE]["operations"]
    for own in systems[MOE]["seeds"][0]["pairs"].values():
        assert own["lines"] == 4
        assert list(own["bleu_by_kind"]) == [VERSES, CATALOGS]
        assert own["wrong_source_nats"] != own["dev_nats"]
    assert pictures["pairs"].stat().st_size > 1000
    assert record["verdict"]["sentence"] in page
    assert "36.47 / 34.40 / 37.46, +3.06" in page


def test_finished_models_are_kept(done: Any, monkeypatch: pytest.MonkeyPatch):
    record, _, _, work = done
    monkeypatch.setattr(translation, "open_lines", lambda plan, say: lines_of(plan, KINDS))
    monkeypatch.setattr(translation, "run_model", lambda *given: pytest.fail("trained again"))
    again, _, _ = run_translation(work, False, TINY)
    assert again["systems"] == record["systems"]


def test_another_plan_in_the_same_place_goes_on_from_no_other_s_weights(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders: list[Path] = []
    own = done[0]["systems"][SINGLE]["seeds"][0]

    def watched(*given: Any) -> Any:
        folders.append(given[5])
        return {"train": {**own["train"], "curve": [{"loss": 1.0}]}, "pairs": own["pairs"]}

    monkeypatch.setattr(translation, "open_lines", lambda plan, say: lines_of(plan, KINDS))
    monkeypatch.setattr(translation, "run_model", watched)
    for plan in (TINY, replace(TINY, steps=12)):
        run_translation(tmp_path, False, plan)
    assert len(set(folders)) == len(folders) == 12


def test_what_is_tested_was_in_no_training_and_in_no_pieces(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    monkeypatch.setattr(
        translation_runs, "train_bpe", lambda texts, size: seen.extend(texts) or TRAIN(texts, size)
    )
    lines = lines_of(TINY, KINDS)
    decode = lines.tokenizer.decode
    texts = {
        part: {decode(ids) for own in by_language.values() for ids in own}
        for part, by_language in lines.parts.items()
    }
    assert texts["train"] <= set(seen)
    for part in ("dev", VERSES, CATALOGS):
        assert texts[part]
        assert not texts[part] & (texts["train"] | set(seen))


TRAIN = translation_runs.train_bpe


def test_bleu_is_of_what_was_written_against_the_target(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[list[str], list[str]]] = []

    def watched(written: list[str], wanted: list[str]) -> Any:
        asked.append((written, wanted))
        return Bleu(1.0, "watched")

    lines = lines_of(TINY, KINDS)
    settings = TINY.settings(MOE, lines.tokenizer.vocab_size)
    found = translation_runs.translate
    model: Any = translation_runs.build(settings).eval()
    monkeypatch.setattr(translation_runs, "bleu", watched)
    record = found(model, lines, lines.ends(settings), ("fr", "en"), TINY)
    (written, wanted), *kinds = asked
    for kind in (VERSES, CATALOGS):
        assert {lines.tokenizer.decode(ids) for ids in lines.parts[kind]["en"]} <= set(KINDS[kind]["en"])
    tested = [ids for kind in (VERSES, CATALOGS) for ids in lines.parts[kind]["en"][:2]]
    assert wanted == [lines.tokenizer.decode(ids) for ids in tested]
    assert kinds == [(written[:2], wanted[:2]), (written[2:], wanted[2:])]
    assert [sample[2] for sample in record["samples"]] == written
    assert [sample[1] for sample in record["samples"]] == wanted
    assert [sample[0] in TEXTS["fr"] for sample in record["samples"]] == [True, True, False, False]


@pytest.mark.parametrize(("system", "change"), [(MOE, 1.0), (DENSE, 9.0), (SINGLE, 9.0)])
def test_the_claim_asks_every_comparison_in_every_seed(done: Any, system: str, change: float):
    record = copy.deepcopy(done[0])
    for name, own in record["systems"].items():
        for seed in own["seeds"]:
            seed["mean_bleu"], seed["perplexity"] = (5.0, 3.0) if name == MOE else (4.0, 3.5)
    assert verdict(record)["held"]
    record["systems"][system]["seeds"][0]["mean_bleu"] = change
    assert not verdict(record)["held"]
    assert not json.dumps(verdict(record)["sentence"]).startswith('"held')


def test_the_papers_numbers_say_what_its_text_says():
    gains = [multi - dense for _, dense, multi in PAPER_BLEU.values()]
    # "11 of the 12 language pairs (by as much as 5.84 points) ... the monolingual models on 8 of 12".
    assert sum(gain > 0 for gain in gains) == 11
    assert max(gains) == pytest.approx(5.84)
    assert sum(multi > mono for mono, _, multi in PAPER_BLEU.values()) == 8


def test_the_plan_has_both_ways_of_every_language():
    assert len(set(PLAN.directions)) == 2 * len(PLAN.languages)
    assert all("en" in direction for direction in PLAN.directions)
    assert PLAN.steps % len(PLAN.directions) == 0
