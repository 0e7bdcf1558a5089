"""DeepSeek-V3 at our size: guesses counted by hand, verdicts, arms that differ in what is said."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.backbones import Decoder
from gatewright.experiments import balance_scope, deepseek_mtp, trials
from gatewright.experiments.balance_scope import BATCH, FREE, SEQUENCE
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
    for target in ("deepseek_v3/mtp", "deepseek_v3/scope"):
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


def test_the_scopes_differ_in_loss_and_rate_alone():
    first, *others = balance_scope.COURSE.trials
    for one in others:
        assert {key for key in one.about if one.about[key] != first.about[key]} <= {"losses", "bias_rate"}
    losses = {one.name: dict(one.make(17)[1].losses) for one in balance_scope.COURSE.trials}
    assert losses == {SEQUENCE: {"sequence_balance": 0.01}, BATCH: {"balance": 0.01}, FREE: {}}
    assert [one.about["bias_rate"] for one in balance_scope.COURSE.trials] == [0.0, 0.0, 0.001]


def test_evenness_by_scope_and_domains_apart_by_hand():
    # Two domains of two windows, two experts, four choices a window. Domain one: 4 0, 3 1; two: 0 4, 1 3.
    counts = np.array([[[4.0, 0.0], [3.0, 1.0]], [[0.0, 4.0], [1.0, 3.0]]])
    found = balance_scope.load_facts(counts, rows=2)
    # Of 4 choices the mean load is 2: windows violate by 1, 0.5, 1, 0.5.
    assert found["sequence"] == pytest.approx(0.75)
    # A batch has a window of each domain: 4 4 and 4 4. All together 8 8.
    assert found["batch"] == found["global"] == 0
    # Shares 7/8, 1/8 and 1/8, 7/8 against 1/2, 1/2: each would move 3/8.
    assert found["apart"] == pytest.approx(3 / 8)


def test_counts_are_of_each_window(model: Decoder):
    windows = torch.arange(64).view(4, 16) % 17
    found = balance_scope.counts_by_window(model, windows, rows=3)
    assert list(found) == ["layers.0.router"]
    assert found["layers.0.router"].shape == (4, 4)
    assert (found["layers.0.router"].sum(axis=1) == 16 * 2).all()
    alone = balance_scope.counts_by_window(model, windows[2:3], rows=1)
    assert (alone["layers.0.router"][0] == found["layers.0.router"][2]).all()


def scoped(*apart: float, bits: tuple[float | None, ...] = (2.0, 2.0)) -> dict[str, Any]:
    load = {"sequence": 1.0, "batch": 0.5, "global": 0.1}
    pairs = zip(apart, bits, strict=True)
    return {"seeds": [{"valid_bpb": own, "load": {**load, "apart": far}} for far, own in pairs]}


def test_domains_have_to_be_less_apart_per_sequence_in_every_seed():
    arms = {SEQUENCE: scoped(0.1, 0.1), BATCH: scoped(0.2, 0.3, bits=(1.9, 1.9)), FREE: scoped(0.2, 0.2)}
    found = balance_scope.scope_verdict({"arms": arms})
    assert found["held"]
    assert found["below_bpb"][BATCH] == pytest.approx([0.1, 0.1])
    arms[FREE] = scoped(0.2, 0.1)
    assert not balance_scope.scope_verdict({"arms": arms})["held"]
    arms[FREE] = scoped(0.2, 0.2, bits=(2.0, None))
    assert balance_scope.scope_verdict({"arms": arms})["sentence"] == f"did not hold: {FREE} diverged"


def test_small_models_of_each_scope_are_trained_and_looked_at(fixed: None, tmp_path: Path):
    sizes = {**SIZES, "future_tokens": 0}
    both = tuple(
        paper_trial(name, "deepseek_v3", losses=losses, bias_rate=rate, **sizes)
        for name, losses, rate in (
            (SEQUENCE, {"sequence_balance": 1e-2}, 0.0),
            (BATCH, {"balance": 1e-2}, 0.0),
            (FREE, {}, 0.01),
        )
    )
    course = Course(
        both,
        SEQUENCE,
        steps=2,
        rows=2,
        context=16,
        seeds=(0,),
        eval_bytes=200,
        timing_rounds=1,
        warmup_steps=1,
    )
    record = trials.run_course(course, tmp_path, "toy", balance_scope.look)
    for arm in record["arms"].values():
        # One domain is not apart from itself.
        assert arm["seeds"][0]["load"]["apart"] == 0
        assert arm["seeds"][0]["load"]["sequence"] >= arm["seeds"][0]["load"]["global"]
    assert not balance_scope.scope_verdict(record)["held"]
