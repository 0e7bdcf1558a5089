"""Parallel text: what is fetched is what is pinned, pairs stand on one side, and a model learns from them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.backbones import DecoderOutput
from gatewright.beams import BeamSearch, beam_search
from gatewright.data import parallel
from gatewright.data.cache import cache_root, file_digest
from gatewright.data.parallel import PairStream, fetch, unpack, verses
from gatewright.data.tokenizer import ByteTokenizer
from gatewright.errors import RunFailure, UserError
from gatewright.papers import get_paper

REAL = cache_root() / "parallel" / parallel.folder_key()[:32]
# Of this test's own: a language that is English backwards, and one that is English in capitals.
LINES = [f"{a} {b} {c}" for a in ("cat", "dog", "bird") for b in ("sees", "wants") for c in ("fish", "nut")]
TEXTS = {"backwards": [line[::-1] for line in LINES], "capitals": [line.upper() for line in LINES]}


def stream(
    texts: dict[str, list[str]] | None = None, targets: list[str] | None = None, **changes: Any
) -> PairStream:
    own: dict[str, Any] = {
        "first_tag": 257,
        "end": 260,
        "batch_size": 4,
        "longest": 60,
        "held_out": 4,
    } | changes
    return PairStream(texts or TEXTS, targets or LINES, ByteTokenizer(), **own)


def packed(folder: Path, name: str = "package/dist/quran_sv.json") -> Path:
    """Write an archive like the package's, with one chapter of two verses."""
    text = json.dumps([{"verses": [{"id": 1, "translation": " Ett. "}, {"id": 2, "translation": "Två."}]}])
    (folder / "file").write_text(text, encoding="utf-8")
    with tarfile.open(folder / "p.tgz", "w:gz") as archive:
        archive.add(folder / "file", name)
        archive.add(folder / "file", "package/other.json")
    (folder / "file").unlink()
    return folder / "p.tgz"


def test_an_archive_is_unpacked_if_it_is_the_pinned_one(tmp_path: Path):
    archive = packed(tmp_path)
    with pytest.raises(RunFailure, match=r"p\.tgz has the checksum .* it is not what is pinned"):
        unpack(archive, tmp_path, "0" * 64)
    unpack(archive, tmp_path, file_digest(archive))
    assert [path.name for path in tmp_path.iterdir()] == ["quran_sv.json"]
    assert verses(tmp_path, "sv") == ["Ett.", "Två."]
    with pytest.raises(UserError, match="language 'de' is not there; allowed: sv"):
        verses(tmp_path, "de")


def test_arabic_stands_in_the_file_of_all_and_loses_its_signs(tmp_path: Path):
    (tmp_path / "own").mkdir()
    text = json.dumps([{"verses": [{"id": 1, "text": "ٱلۡحَمۡدُ"}, {"id": 2, "text": "مِن\u0640"}]}])
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        archive.add(tmp_path / "file", "package/dist/quran.json")
    unpack(tmp_path / "p.tgz", tmp_path / "own", file_digest(tmp_path / "p.tgz"))
    assert verses(tmp_path / "own", "ar") == ["الحمد", "من"]


def test_fetching_is_npms_and_done_once(tmp_path: Path, monkeypatch):
    calls: list[list[str]] = []

    def npm(words: list[str], *, cwd: Path, **_: Any) -> Any:
        calls.append(words)
        monkeypatch.setattr(parallel, "SHA256", file_digest(packed(cwd)))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", npm)
    said: list[str] = []
    assert verses(fetch(tmp_path, said.append), "sv") == ["Ett.", "Två."]
    assert calls == [["npm", "pack", "--silent", "quran-json@3.1.2"]]
    assert said == ["fetching quran-json@3.1.2 with npm"]


def test_what_npm_cannot_do_is_one_line(tmp_path: Path, monkeypatch):
    def fails(words: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(words, 1, "", "npm error\nnpm error no network")

    def is_not_there(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(RunFailure, match=r"npm could not fetch quran-json@3\.1\.2: npm error no network"):
        fetch(tmp_path, lambda _: None)
    monkeypatch.setattr(subprocess, "run", is_not_there)
    with pytest.raises(UserError, match="npm is not installed"):
        fetch(tmp_path, lambda _: None)
    assert not list((tmp_path / "parallel").iterdir())


def test_a_pair_by_hand():
    held = stream({"x": ["ab", "c"]}, ["A", "BCD"], batch_size=2, held_out=9)
    batch = held.batch(0)
    order = np.argsort(batch.source_mask.sum(axis=1))  # the short source first
    assert batch.source[order].tolist() == [[257, 99, 260, 260], [257, 97, 98, 260]]
    assert batch.source_mask[order].sum(axis=1).tolist() == [3, 4]
    assert batch.labels[order].tolist() == [[66, 67, 68, 260], [65, 260, 260, 260]]
    assert batch.target[order].tolist() == [[260, 66, 67, 68], [260, 65, 260, 260]]
    assert batch.target_mask[order].sum(axis=1).tolist() == [4, 2]


def texts_of(one: PairStream) -> set[str]:
    return {ByteTokenizer().decode(target[:-1]) for _, _, target in one.pairs}


def test_no_target_stands_on_both_sides():
    lines = [*LINES, *LINES[:5]]  # some stand twice
    texts = {name: [*own, *own[:5]] for name, own in TEXTS.items()}
    train, valid = stream(texts, lines), stream(texts, lines, valid=True)
    assert texts_of(train) | texts_of(valid) == set(LINES)
    assert not texts_of(train) & texts_of(valid)
    assert texts_of(valid)
    assert len(train.pairs) + len(valid.pairs) == 2 * len(lines)


def test_an_epoch_has_every_pair_once_and_a_batch_depends_on_its_index():
    one = stream(batch_size=6)
    batches = [one.batch(i) for i in range(len(one.pairs) // 6)]
    seen = [
        (int(n), tuple(row[mask]))
        for b in batches
        for n, row, mask in zip(b.language, b.source, b.source_mask, strict=True)
    ]
    assert len(seen) == len(set(seen)) == len(one.pairs) - len(one.pairs) % 6
    again = stream(batch_size=6).batch(1)
    assert all(
        np.array_equal(getattr(again, f.name), getattr(batches[1], f.name)) for f in dataclasses.fields(again)
    )
    assert all(row[0] == 257 + n for b in batches for n, row in zip(b.language, b.source, strict=True))


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match="x has 1 lines for 2 of the target; allowed: one each"):
        stream({"x": ["a"]}, ["a", "b"])
    with pytest.raises(UserError, match="no pair of at most 2 ids"):
        stream(longest=2)
    with pytest.raises(UserError, match="batch_size 0, longest 60, held_out 4; allowed: 1, 1, 2"):
        stream(batch_size=0)


def learn(one: PairStream, steps: int, width: int = 32) -> tuple[Any, list[float]]:
    """Train a tiny GShard on a stream; return it and its losses in nats per label."""
    file = get_paper("gshard")
    settings = file.Settings(
        width=width, head_dim=16, num_experts=4, expert_width=32, ffn_width=32, context=8
    )
    settings = dataclasses.replace(settings, num_sentinels=one.end - 257)
    torch.manual_seed(0)
    model, objective = file.build(settings), file.objective(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        batch = one.batch(step)
        source, source_mask, target, labels, mask = (
            torch.from_numpy(getattr(batch, name))
            for name in ("source", "source_mask", "target", "labels", "target_mask")
        )
        output = model(source, target, source_mask, mask, key=torch.tensor(step))
        # Padding is no label.
        loss = objective(DecoderOutput(output.logits[mask][None], output.stats), labels[mask][None])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.task.detach()))
    return model, losses


def test_a_tiny_model_learns_to_translate():
    one = stream({"capitals": TEXTS["capitals"]}, LINES, batch_size=8)
    model, losses = learn(one, 40)
    assert losses[-1] < 2 < 4 < losses[0]
    batch = one.batch(0)
    given = {"start": one.end, "end": one.end, "source_mask": torch.from_numpy(batch.source_mask)}
    found = beam_search(model, torch.from_numpy(batch.source), search=BeamSearch(2, max_length=20), **given)
    assert [len(own) for own in found] == [2] * 8
    assert all(own[0].score >= own[1].score for own in found)


@pytest.mark.skipif(not REAL.is_dir(), reason="no parallel text here; `gatewright data --fetch` gets it")
def test_real_verses_are_pairs_and_are_learned_from():
    texts = {language: verses(REAL, language) for language in parallel.LANGUAGES}
    targets = verses(REAL, parallel.TARGET)
    assert {len(lines) for lines in (*texts.values(), targets)} == {6236}
    few = {language: lines[:300] for language, lines in texts.items()}
    own: dict[str, Any] = {"end": 257 + len(few), "batch_size": 4, "longest": 100, "held_out": 20}
    train = stream(few, targets[:300], **own)
    assert not texts_of(train) & texts_of(stream(few, targets[:300], valid=True, **own))
    _, losses = learn(train, 15)
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
