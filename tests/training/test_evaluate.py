"""A run opened again: its weights, its settings, and its bits per byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.cli.paper import run_from
from gatewright.data import open_corpus
from gatewright.errors import RunFailure, UserError
from gatewright.training import TrainRun, evaluate, loop, train
from gatewright.training.checkpoint import newest_checkpoint
from gatewright.training.evaluate import EvalRun, evaluate_run
from gatewright.training.load import load_run
from tests.training.runs import tiny_run, write_text


@pytest.fixture(scope="module")
def trained(data: list[str], shared: Path) -> Path:
    """The folder of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEWRIGHT_CACHE", str(shared / "cache"))
        patch.setattr(loop, "write_report", lambda *_: None)
        train(tiny_run(data, shared / "trained", steps=8, router_dtype="bf16", tie_embeddings=True))
    return shared / "trained"


def test_the_weights_are_those_of_the_newest_checkpoint(trained: Path):
    held = newest_checkpoint(trained / "checkpoints")
    assert held is not None
    for averaged, file in ((False, "model"), (True, "average")):
        loaded = load_run(trained, averaged=averaged)
        assert loaded.step == 8
        assert not loaded.model.training
        own = dict(loaded.model.named_parameters())
        assert set(own) == set(held.tensors[file])
        assert all(torch.equal(own[name], tensor) for name, tensor in held.tensors[file].items())
        assert {m.dtype for n, m in loaded.model.named_modules() if n.endswith("router")} == {torch.bfloat16}


def test_run_toml_gives_the_run_back(trained: Path, data: list[str]):
    loaded = load_run(trained)
    given = tiny_run(data, trained, steps=8, router_dtype="bf16", tie_embeddings=True)
    assert loaded.settings == given.model
    assert run_from([], TrainRun, trained / "run.toml", "gatewright train") == given


def test_an_evaluation_gives_what_the_run_ended_with(trained: Path, data: list[str]):
    curve = json.loads((trained / "train.json").read_text())["runs"][0]["sides"][0]["curve"]
    found = evaluate_run(trained, EvalRun(eval_bytes=120, batch_size=3))
    assert found.step == 8
    assert found.bits_per_byte == pytest.approx(curve[-1]["valid_bpb"], rel=1e-6)
    assert found.domains == pytest.approx(curve[-1]["domains"], rel=1e-6)
    averaged = evaluate_run(trained, EvalRun(eval_bytes=120, averaged=True))
    assert averaged.bits_per_byte != found.bits_per_byte
    one = evaluate_run(trained, EvalRun(data=(data[1],), eval_bytes=60))
    assert one.domains == pytest.approx({"beta": found.domains["beta"]}, rel=1e-6)
    assert "beta" in found.to_text()
    assert found.to_dict()["num_bytes"] >= 120


def test_a_tokenizer_of_its_own_stays_although_the_text_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    (data,) = write_text(tmp_path / "text", ("own",))
    train(tiny_run([data], tmp_path / "run", steps=4, tokenizer="bpe:290"))
    saved = load_run(tmp_path / "run").tokenizer
    write_text(tmp_path / "text", ("other", "own"))
    trained_now = open_corpus([data], tokenizer="bpe:290").tokenizer
    assert trained_now.to_json() != saved.to_json()
    read: list[np.ndarray] = []
    inner = evaluate.bits_of

    def noted(model: Any, objective: Any, texts: Any, *more: Any, **settings: Any) -> Any:
        read.append(texts["own"][1:101])
        return inner(model, objective, texts, *more, **settings)

    monkeypatch.setattr(evaluate, "bits_of", noted)
    evaluate_run(tmp_path / "run")
    evaluate_run(tmp_path / "run", EvalRun(data=(data,)))
    written = "".join(path.read_text() for path in Path(data).iterdir())
    assert len(read) == 2
    for tokens in read:
        assert saved.decode(tokens) in written
        assert trained_now.decode(tokens) not in written


def test_what_is_no_run_is_refused(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no run \(run.toml and checkpoints/\)"):
        load_run(tmp_path)
    shutil.copytree(trained, tmp_path / "race/seed0/sparse")
    with pytest.raises(UserError, match=r"holds no run .*; runs below it: .*race/seed0/sparse"):
        load_run(tmp_path / "race")
    with pytest.raises(UserError, match="device 'gpu'; allowed: cpu, cuda or cuda:N"):
        load_run(trained, device="gpu")
    shutil.rmtree(tmp_path / "race/seed0/sparse/checkpoints")
    (tmp_path / "race/seed0/sparse/checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_run(tmp_path / "race/seed0/sparse")


def test_a_broken_newest_checkpoint_is_not_opened(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000008/model.safetensors").write_bytes(b"")
    assert load_run(tmp_path / "run").step == 7
    (tmp_path / "run/checkpoints/step-00000007/model.safetensors").write_bytes(b"")
    with pytest.raises(RunFailure, match=r"no checkpoint in .* is whole"):
        load_run(tmp_path / "run")


def test_a_run_without_averages_has_none_to_open(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    train(tiny_run(data, tmp_path / "run", steps=2, ema=0.0))
    with pytest.raises(UserError, match=r"was trained without averaged weights \(ema 0\)"):
        load_run(tmp_path / "run", averaged=True)


@pytest.mark.parametrize("name", ["eval_bytes", "batch_size"])
def test_numbers_below_one_are_refused(name: str):
    with pytest.raises(UserError, match=f"{name} 0; allowed: 1 or more"):
        EvalRun(**{name: 0})


def test_experts_in_int8_are_evaluated_near_the_trained_ones(trained: Path):
    plain, int8 = (evaluate_run(trained, EvalRun(eval_bytes=120, int8_experts=on)) for on in (False, True))
    assert int8.bits_per_byte == pytest.approx(plain.bits_per_byte, rel=1e-2)
    assert int8.bits_per_byte != plain.bits_per_byte
    kinds = {type(m).__name__ for m in load_run(trained, int8_experts=True).model.modules()}
    assert "Int8Experts" in kinds
    assert "Experts" not in kinds
