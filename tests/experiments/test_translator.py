"""gatewright pairs and translate: a model that learns to translate, resumes, and says what it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.beams import BeamSearch
from gatewright.cli import main
from gatewright.errors import RunFailure, UserError
from gatewright.experiments import translator as module
from gatewright.experiments.pairs_run import TranslatorRun, directions, open_texts, split_ids
from gatewright.experiments.translating import open_translator
from gatewright.experiments.translator import train_translator
from gatewright.papers.gshard import Settings
from gatewright.training.checkpoint import newest_checkpoint
from gatewright.training.load import load_run
from gatewright.training.pairs import PairTrainer
from tests.experiments.pair_lines import WORDS, write_table

MODEL = Settings(width=32, num_heads=2, head_dim=16, num_experts=4, expert_width=32, ffn_width=64, context=32)
FEW_TAGS = dataclasses.replace(MODEL, num_sentinels=1, context=4)
QUICK: dict[str, Any] = {
    "steps": 8,
    "rows": 8,
    "pieces": 300,
    "longest": 30,
    "test_lines": 4,
    "beams": 1,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TranslatorRun, dict[str, Any]]:
    """A run that has learned numbers in words, French into English."""
    root = tmp_path_factory.mktemp("learned")
    run = TranslatorRun(
        **{**QUICK, "steps": 240, "rows": 32, "test_lines": 8}, learning_rate=1e-2, held_out=0.08,
        data=str(write_table(root / "lines.tsv")), model=MODEL, out=str(root / "run"),
    )  # fmt: skip
    done = train_translator(run)
    assert done.record is not None
    return run, done.record


def test_it_learns_to_translate_lines_that_it_has_not_seen(learned: Any):
    run, record = learned
    own = record["directions"]["fr-en"]
    assert list(record["directions"]) == ["fr-en"]
    assert own["nats_per_token"] < 0.5 < own["wrong_nats_per_token"]
    # Lines of two words have no runs of four, so that their BLEU is 0 or not measured; the texts are right.
    assert sum(sample["written"] == sample["wanted"] for sample in own["samples"]) >= 2
    assert record["train"]["curve"][-1]["step"] == 240
    assert record["train"]["curve"][-1]["dev"] < 0.5
    lines = split_ids(*open_texts(run, lambda line: None))
    test = {lines.tokenizer.decode(ids) for ids in lines.parts["test"]["fr"]}
    assert {sample["source"] for sample in own["samples"]} <= test - {""}
    right = {
        f"{WORDS['fr'][i]} {WORDS['fr'][j]}": f"{WORDS['en'][i]} {WORDS['en'][j]}"
        for i in range(10) for j in range(10)
    }  # fmt: skip
    assert all(right[sample["source"]] == sample["wanted"] for sample in own["samples"])


def test_a_run_translates_texts_and_tells_of_each(learned: Any, capsys: Any, monkeypatch: Any):
    run, _ = learned
    assert main(["translate", run.out, "--text", "deux trois", "neuf un", "--threads", "1"]) == 0
    assert capsys.readouterr().out == "two three\nnine one\n"
    monkeypatch.setattr("sys.stdin", iter(["deux trois\n", "\n", "sept huit\n"]))
    assert main(["translate", run.out, "--json", "--beams", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [own["source"] for own in told["translations"]] == ["deux trois", "sept huit"]
    assert [own["text"] for own in told["translations"]] == ["two three", "seven eight"]
    assert told["step"] == 240
    assert all(own["log_probability"] < 0 for own in told["translations"])
    # One text's translation does not depend on what else is translated, nor on how many at a time.
    whole = open_translator(run.out)
    both = whole.translate(["deux trois"] * 33 + ["neuf un"], search=BeamSearch(1))
    alone = whole.translate(["neuf un"], search=BeamSearch(1))[0]
    assert (both[33]["source"], both[33]["text"]) == ("neuf un", alone["text"])
    assert both[33]["log_probability"] == pytest.approx(alone["log_probability"], abs=1e-4)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = str(write_table(tmp_path / "lines.tsv"))
    run = TranslatorRun(**QUICK, data=data, model=MODEL, out=str(tmp_path / "whole"), checkpoint_every=3)
    whole = train_translator(run)
    advance, stops = PairTrainer.advance, []

    def watched(self: PairTrainer) -> Any:
        if self.step == 4 and not stops:
            stops.append(self.step)
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(PairTrainer, "advance", watched)
    again = dataclasses.replace(run, out=str(tmp_path / "parts"))
    first = train_translator(again)
    assert first.stopped
    assert first.record is None
    assert "--resume" in first.to_text()
    held = newest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert held is not None
    assert held.step == 5
    second = train_translator(dataclasses.replace(again, resume=True))
    assert second.record is not None
    assert whole.record is not None
    assert second.record["directions"] == whole.record["directions"]
    one, other = (newest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "parts"))
    assert one is not None
    assert other is not None
    assert all(
        torch.equal(value, other.tensors["model"][name]) for name, value in one.tensors["model"].items()
    )


def test_a_run_goes_on_with_its_own_settings_and_text_alone(tmp_path: Path):
    data = write_table(tmp_path / "lines.tsv")
    run = TranslatorRun(**QUICK, data=str(data), model=MODEL, out=str(tmp_path / "run"))
    train_translator(run)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        train_translator(run)
    with pytest.raises(UserError, match=r"^rows is 4 but the run in .* was begun with 8"):
        train_translator(dataclasses.replace(run, rows=4, resume=True))
    data.write_text(data.read_text(encoding="utf-8").replace("two", "too"), encoding="utf-8")
    with pytest.raises(UserError, match="the text is not the one that"):
        train_translator(dataclasses.replace(run, resume=True))
    with pytest.raises(UserError, match="is a run of pairs; translate with it"):
        load_run(run.out)
    assert main(["pairs", "gshard", "--out", str(data), "--data", str(data)]) == 2


def test_every_target_has_a_tag_and_no_language_is_paired_with_itself(tmp_path: Path, capsys: Any):
    data = write_table(tmp_path / "lines.tsv", ("en", "fr", "sv"))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**QUICK, "steps": 2}.items()]
    out = tmp_path / "run"
    more = ["--into", "en", "sv", "--data", str(data), "--out", str(out), "--num-experts", "2", "--json"]
    assert main(["pairs", "switch_t5", *flags, *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["directions"]) == ["en-sv", "fr-en", "fr-sv", "sv-en"]
    whole = open_translator(out)
    size = whole.tokenizer.vocab_size
    assert (whole.tags, whole.end) == ({"en": size, "sv": size + 1}, size + 100)
    assert main(["translate", str(out), "--text", "un deux"]) == 2
    assert capsys.readouterr().err.strip().endswith("into None; allowed for this run: en, sv")
    assert main(["translate", str(out), "--text", "un deux", "--into", "svv"]) == 2
    assert "did you mean 'sv'?" in capsys.readouterr().err
    assert main(["translate", str(out), "--text", " ", "--into", "sv"]) == 2
    assert "text 1 is empty" in capsys.readouterr().err


def test_without_sacrebleu_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(*_: Any) -> Any:
        raise UserError("sacrebleu is not installed")

    monkeypatch.setattr(module, "bleu", missing)
    data = str(write_table(tmp_path / "lines.tsv"))
    done = train_translator(TranslatorRun(**QUICK, data=data, model=MODEL, out=str(tmp_path / "run")))
    assert done.record is not None
    assert done.record["directions"]["fr-en"]["bleu"] is None
    assert "BLEU not measured" in done.to_text()
    assert "sacrebleu is not installed" in done.to_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"languages": ("xx",)}, r"language 'xx' is not in the data; allowed: en, fr"),
        ({"languages": ("en",)}, r"languages en into en: no pair"),
        ({"longest": 1}, r"no training pair has 1 to 1 ids"),
        ({"model": FEW_TAGS, "into": ("en", "fr")}, "num_sentinels 1 for 2 languages"),
        ({"data": "none.tsv"}, "none.tsv is not there"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path: Path, change: Any, told: str):
    base = {**QUICK, "data": str(write_table(tmp_path / "lines.tsv")), "model": MODEL}
    with pytest.raises(UserError, match=told):
        train_translator(TranslatorRun(**{**base, "out": str(tmp_path / "out"), **change}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "many", ""])
def test_every_number_is_checked(value: str, capsys: pytest.CaptureFixture[str]):
    numbers = ["pieces", "longest", "held_out", "steps", "rows", "learning_rate", "warmup_steps"]
    for name in [*numbers, "test_lines", "beams", "alpha", "checkpoint_every", "threads"]:
        flag = f"--{name.replace('_', '-')}"
        assert main(["pairs", "--data", "unread", flag, value]) == 2
        err = capsys.readouterr().err
        assert (name in err or flag in err, err.count("\n")) == (True, 1), err
    for flag in ("--beams", "--alpha", "--max-length", "--threads"):
        assert main(["translate", "unread", flag, value]) == 2
        assert flag[2:].replace("-", "_") in capsys.readouterr().err.replace("-", "_")


def test_the_directions_are_those_that_are_asked():
    run = TranslatorRun(languages=("fr", "en"), into=("en", "sv"))
    assert directions(run) == (("fr", "en"), ("fr", "sv"), ("en", "sv"))
    with pytest.raises(UserError, match=r"into \['en', 'en'\]; allowed"):
        TranslatorRun(into=("en", "en"))
    with pytest.raises(UserError, match=r"paper 'gshart' is no model of pairs; did you mean 'gshard'"):
        TranslatorRun(paper="gshart")


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path, learned: Any):
    with pytest.raises(UserError, match="holds no run"):
        open_translator(tmp_path)
    run, _ = learned
    shutil.copytree(run.out, tmp_path / "run")
    for held in (tmp_path / "run" / "checkpoints").iterdir():
        (held / "state.json").write_text("{}")
    with pytest.raises(RunFailure, match="is whole"):
        open_translator(tmp_path / "run")
