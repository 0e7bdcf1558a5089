"""DeepSeek-V3 at our size: guesses counted by hand, verdicts, arms that differ in what is said."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.backbones import Decoder
from gatewright.experiments import deepseek_mtp, trials
from gatewright.experiments.deepseek_mtp import OFF, ON
from gatewright.experiments.registry import TARGETS
from gatewright.experiments.trials import Course, paper_trial
from gatewright.papers import deepseek_v3
from tests.training.runs import FixedText

SIZES: dict[str, Any] = {
    "width": 8,
    "num_layers": 1,
    "num_heads": 1,
    "latent": (4, 4, 4, 4, 4),
    "num_experts": 4,
    "num_selected": 2,
    "expert_width": 4,
    "moe_layers": "all",
    "context": 16,
}


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the default corpus."""
    monkeypatch.setattr(trials, "open_corpus", lambda *_, **__: FixedText())


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    built: Decoder = deepseek_v3.build(deepseek_v3.Settings(vocab_size=17, **SIZES))
    return built.eval()


def test_expected_before_it_was_run():
    expected = tomllib.loads((Path(__file__).parents[2] / "reproductions" / "expected.toml").read_text())
    for target in ("deepseek_v3/mtp",):
        paper, name = target.split("/")
        assert set(expected[paper][name]) == {"metric", "sign", "least_effect"}
        assert target in TARGETS


def test_the_arms_differ_in_the_further_block_alone():
    off, on = (deepseek_mtp.COURSE.trial(name) for name in (OFF, ON))
    assert {key for key in on.about if on.about[key] != off.about[key]} == {"future_tokens"}
    assert not len(off.make(17)[0].future)
    assert len(on.make(17)[0].future) == 1


def always(model: Decoder, main: int, further: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the main head be sure of one id, and the further block of another."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[main, 0], model.head.weight[further, 1] = 100.0, 100.0
    read, ahead = model.read, model.ahead

    def one(value: torch.Tensor, place: int) -> torch.Tensor:
        found = torch.zeros_like(value)
        found[..., place] = 1.0
        return found

    monkeypatch.setattr(model, "read", lambda *a, **k: (one(read(*a, **k)[0], 0), None))
    monkeypatch.setattr(model, "ahead", lambda *a, **k: (one(ahead(*a, **k)[0], 1), None))


def test_guesses_are_counted_by_hand(model: Decoder, monkeypatch: pytest.MonkeyPatch):
    prompt = torch.tensor([[1, 2, 3]])
    # Written: 5 5 5 5 5 5, guessed 5 each time. Read 1 has the prompt and makes no guess; read 2 guesses, 3
    # is that guess; 4 guesses, 5 is that guess; 6 guesses, which nothing tests: 2 of 2.
    always(model, 5, 5, monkeypatch)
    assert deepseek_mtp.accepted_in_writing(model, prompt, 6) == (2, 2)
    assert deepseek_mtp.accepted_in_text(model, torch.arange(16).view(2, 8)) == (14, 14)


def test_wrong_guesses_are_counted_too(model: Decoder, monkeypatch: pytest.MonkeyPatch):
    # Written 5s, guessed 7s: reads 2 to 5 guess, and each of reads 3 to 6 finds the guess before it wrong.
    always(model, 5, 7, monkeypatch)
    assert deepseek_mtp.accepted_in_writing(model, torch.tensor([[1, 2, 3]]), 6) == (0, 4)
    assert deepseek_mtp.accepted_in_text(model, torch.arange(16).view(2, 8)) == (0, 14)


def mtp_record(*accepted: float, second: float | None = 2.1) -> dict[str, Any]:
    on = [
        {"seed": n, "valid_bpb": 2.0, "accepted": {"written": share, "guesses": 100, "text": share}}
        for n, share in enumerate(accepted)
    ]
    on[-1]["valid_bpb"] = second
    off = [{"seed": n, "valid_bpb": 2.0} for n in range(len(accepted))]
    time = {"median": 1.4, "low": 1.3, "high": 1.5}
    return {"arms": {OFF: {"seeds": off, "step_time": time}, ON: {"seeds": on, "step_time": time}}}


def test_half_of_the_guesses_have_to_be_right_in_every_seed():
    found = deepseek_mtp.mtp_verdict(mtp_record(0.6, 0.5))
    assert found["held"]
    assert found["more_bpb"] == pytest.approx([0.0, 0.1])
    assert "60 %, 50 % are right on real text and 55 % in writing" in found["sentence"]
    assert not deepseek_mtp.mtp_verdict(mtp_record(0.6, 0.49))["held"]


def test_a_diverged_model_is_named():
    found = deepseek_mtp.mtp_verdict(mtp_record(0.6, 0.5, second=None))
    assert found == {"held": False, "sentence": f"did not hold: {ON} diverged"}


def test_small_models_are_trained_and_their_guesses_counted(fixed: None, tmp_path: Path):
    both = tuple(
        paper_trial(name, "deepseek_v3", future_tokens=depth, **SIZES) for name, depth in ((OFF, 0), (ON, 1))
    )
    course = Course(
        both, OFF, steps=2, rows=2, context=16, seeds=(0,), eval_bytes=200, timing_rounds=1, warmup_steps=1
    )
    record = trials.run_course(course, tmp_path, "toy", deepseek_mtp.look)
    (found,) = record["arms"][ON]["seeds"]
    assert 0 <= found["accepted"]["written"] <= 1
    assert 0 <= found["accepted"]["text"] <= 1
    assert found["accepted"]["guesses"] > 0
    assert "accepted" not in record["arms"][OFF]["seeds"][0]
    assert deepseek_mtp.mtp_verdict(record)["sentence"]
