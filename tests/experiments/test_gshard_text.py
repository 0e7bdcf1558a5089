"""The texts of gshard/quality and one model on them: sides, cut and unseen pairs, controls, writing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gatewright.beams import BeamSearch
from gatewright.data.parallel import exchanged
from gatewright.data.translations import first_batches
from gatewright.errors import UserError
from gatewright.evaluation.bleu import Bleu
from gatewright.experiments import gshard_runs, gshard_text
from gatewright.experiments.gshard_text import many_to_many, many_to_one, split_texts
from gatewright.experiments.written import write_texts
from tests.experiments.gshard_words import CATALOGS, TEXT, TINY, VERSES, sources


def test_no_text_of_either_source_stands_on_two_sides():
    parts = split_texts(replace(TEXT, low_share=1.0), sources().lines)
    sides: dict[str, set[str]] = {}
    for name, texts in parts.items():
        lines = {line for own in texts.values() for line in own if line}
        sides.setdefault(name.partition("/")[0], set()).update(lines)
    assert all(sides[part] for part in ("train", "dev", "test"))
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not sides[one] & sides[other]
    # Both sources are on each side, and the book's lines that are trained on are left out of it.
    assert {"train", "dev/verses", "dev/catalogs", "test/verses", "test/catalogs", "test/handbook"} == set(
        parts
    )
    count = sum(bool(line) for line in VERSES["en"] + CATALOGS["en"])
    kept = sum(len(own["en"]) for name, own in parts.items() if name != "test/handbook")
    assert kept == count
    swedish = [line for line in parts["train"]["sv"] if line]
    assert swedish
    assert not set(swedish) - set(VERSES["sv"])


def test_the_book_is_without_what_is_trained_on():
    lines = sources().lines
    plain = split_texts(TEXT, lines)
    trained = next(line for line in plain["train"]["fr"] if line)
    lines["handbook"]["fr"][3] = trained
    assert split_texts(TEXT, lines)["test/handbook"]["fr"][3] == ""
    assert plain["test/handbook"]["fr"][3] != ""


def test_the_cut_language_has_its_share_left_in_training_alone():
    whole, cut = (split_texts(replace(TEXT, low_share=s), sources().lines) for s in (1.0, 0.2))
    count = {part: sum(map(bool, own["es"])) for part, own in whole.items()}
    left = {part: sum(map(bool, own["es"])) for part, own in cut.items()}
    assert left == count | {"train": round(0.2 * count["train"])}
    assert {p: o["fr"] for p, o in cut.items()} == {p: o["fr"] for p, o in whole.items()}
    # As few in every model's ids, the bilingual one's too.
    one = many_to_one(TEXT, cut)
    assert sum(bool(len(ids)) for ids in one.parts["train"]["es"]) == left["train"]


def test_without_the_book_it_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def is_not_there(**_: Any) -> Any:
        raise UserError("apt-get is not installed; x; y")

    monkeypatch.setattr(gshard_text, "fetch", lambda **_: tmp_path)
    monkeypatch.setattr(gshard_text, "verses", lambda folder, language: VERSES[language])
    monkeypatch.setattr(gshard_text, "fetch_catalogs", lambda **_: tmp_path)
    monkeypatch.setattr(gshard_text, "catalog_lines", lambda folder: CATALOGS)
    monkeypatch.setattr(gshard_text, "fetch_handbook", is_not_there)
    said: list[str] = []
    found = gshard_text.open_sources(TEXT, said.append)
    assert set(found.lines) == {"verses", "catalogs"}
    assert found.missing == {"handbook": "apt-get is not installed; x; y"}
    assert said == ["going on without the held-out domain: apt-get is not installed; x; y"]
    assert found.lines["catalogs"]["sv"] == [""] * len(CATALOGS["en"])


def test_a_wrong_source_is_the_one_of_the_line_before():
    one = many_to_one(TEXT, split_texts(TEXT, sources().lines))
    (batch,) = first_batches(one.parts["test/verses"], ("fr", "en"), one.ends(8), 3)
    moved = exchanged(batch)
    assert np.array_equal(moved.source, batch.source[[2, 0, 1]])
    assert np.array_equal(moved.source_mask, batch.source_mask[[2, 0, 1]])
    assert moved.labels is batch.labels
    assert first_batches(one.parts["dev/catalogs"], ("sv", "en"), one.ends(8), 3) == []


def replace_parts(corpus: Any) -> Any:
    """Return a corpus of verses alone."""
    return corpus._replace(
        parts={name: own for name, own in corpus.parts.items() if "/c" not in name and "/h" not in name}
    )


def test_what_is_written_is_searched_for_and_stands_beside_its_reference(monkeypatch: pytest.MonkeyPatch):
    one = many_to_one(TEXT, split_texts(TEXT, sources().lines))
    model: Any = gshard_runs.build(TINY.settings(TINY.systems[0], one)).eval()
    plan, ends = replace(TINY, text=replace(TEXT, longest=4)), one.ends(8)
    batches = first_batches(one.parts["test/verses"], ("fr", "en"), ends, 2)
    written = write_texts(model, batches, one.target, ends, BeamSearch(1, 0.6, 5))
    assert len(written) == 2
    asked: list[Any] = []
    monkeypatch.setattr(gshard_runs, "write_texts", lambda *given: written)
    monkeypatch.setattr(gshard_runs, "bleu", lambda *both: asked.append(both) or Bleu(1.0, "watched"))
    found = gshard_runs.quality(plan, model, replace_parts(one), ("fr", "en"), ends)
    wanted = [one.target.decode(ids) for ids in one.parts["test/verses"]["en"][:2]]
    assert asked[:2] == [(written, wanted), (written[::-1], wanted)]
    own = found["sources"]["verses"]
    assert own["tokens"] == sum(len(ids) + 1 for ids in one.parts["test/verses"]["en"][:2])
    assert own["nats"] != own["wrong_nats"]
    assert own["sample"][1:] == [wanted[0], written[0]]


def test_pairs_that_are_unseen_are_in_no_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    many = many_to_many(TEXT, split_texts(replace(TEXT, low_share=1.0), sources().lines))
    seen: set[tuple[str, str]] = set()
    plan = replace(TINY, steps=10)
    decode = many.source.decode
    of = {decode(ids): name for name in ("en", "es", "fr") for ids in many.parts["train"][name] if len(ids)}
    trainer = gshard_runs.PairTrainer

    class Watched(trainer):  # type: ignore[misc, valid-type]
        def advance(self) -> Any:
            batch = self.stream.batch(self.step)
            for source, mask, labels, there in zip(
                batch.source, batch.source_mask, batch.labels, batch.target_mask, strict=True
            ):
                pair = of[decode(source[mask][1:-1])], of[decode(labels[there][:-1])]
                assert source[0] == many.ends(plan.model.num_sentinels).tags[pair[1]]
                seen.add(pair)
            return super().advance()

    def handed_on(model: Any, batches: Any, tokenizer: Any, ends: Any, search: Any) -> list[str]:
        rows = [row for batch in batches for row in zip(batch.source, batch.source_mask, strict=True)]
        return [tokenizer.decode(source[mask][1:-1]) for source, mask in rows]

    monkeypatch.setattr(gshard_runs, "PairTrainer", Watched)
    monkeypatch.setattr(gshard_runs, "write_texts", handed_on)
    settings = plan.settings(plan.systems[-1], many)
    found = gshard_runs.run_model(
        plan, settings, many, TEXT.seen, TEXT.unseen, 0, tmp_path, lambda share: None
    )
    assert seen == set(TEXT.seen)
    assert seen == {(a, b) for a in ("en", "es", "fr") for b in ("en", "es", "fr") if a != b} - set(
        TEXT.unseen
    )
    assert set(found["directions"]) == {"es-fr", "fr-es"}
    # Of sources that are handed on as they are.
    assert all(
        own["sources"]["verses"]["sample"][2] in VERSES[name[:2]] for name, own in found["directions"].items()
    )
