"""Sampling options by hand, and against the processors of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gatewright.errors import UserError
from gatewright.generation import Sampling, generate, next_probabilities
from gatewright.generation.sampling import penalised
from tests.test_generation import Fixed

# Probabilities 0.1, 0.4, 0.2, 0.3; in fp64, so that 0.2 is half of 0.4 to the last bits.
LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Half of 0.4 is 0.2, which stays: of 0.9 that are left, 4, 2 and 3 ninths.
        ({"min_p": 0.5}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 0.51}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.25}, [0.1, 0.4, 0.2, 0.3]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        # Temperature first: squares 1, 16, 4, 9; half of 16 is 8.
        ({"min_p": 0.5, "temperature": 0.5}, [0, 16 / 25, 0, 9 / 25]),
        # Behind top_k and top_p, whose sums change no ratio.
        ({"min_p": 0.7, "top_k": 3}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.1, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_min_p_by_hand(arguments: dict[str, Any], expected: list[float]):
    assert next_probabilities(LOGITS, Sampling(**arguments)).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_repetition_penalty_by_hand():
    # Ids 0 and 1 stand in the text, 0 twice: 2 / 4 and -1 * 4; the others stay.
    logits, text = torch.tensor([2.0, -1.0, 0.0, 1.0]), torch.tensor([0, 1, 0])
    assert penalised(logits, text, 4).tolist() == [0.5, -4, 0, 1]
    found = next_probabilities(logits, Sampling(repetition_penalty=4), text)
    parts = [math.exp(0.5), math.exp(-4), 1, math.e]
    assert found.tolist() == pytest.approx([part / sum(parts) for part in parts])
    # Before the temperature, so that the likeliest id may be another one.
    greedy = Sampling(temperature=0, repetition_penalty=4)
    assert next_probabilities(logits, greedy, text).tolist() == [0, 0, 0, 1]


def test_the_penalty_counts_the_prompt_and_what_was_drawn():
    logits = torch.tensor([3.0, 2.5, 2.0, 0.0])
    # The prompt holds 2, which counts 1; then 3.0, 2.5 -> id 0; 1.5, 2.5 -> 1; 1.5, 1.25 -> 0 again.
    drawn = generate(Fixed(logits), [2], max_new_tokens=3, temperature=0, repetition_penalty=2)
    assert drawn == [0, 1, 0]
    assert generate(Fixed(logits), [2], max_new_tokens=3, temperature=0) == [0, 0, 0]
    held = generate(Fixed(logits), [0], max_new_tokens=1, temperature=0, repetition_penalty=2)
    assert held == [1]
    rows = generate(
        Fixed(logits), torch.tensor([[2], [0]]), max_new_tokens=3, temperature=0, repetition_penalty=2
    )
    assert rows == [[0, 1, 0], [1, 2, 0]]


def test_options_are_those_of_transformers():
    hf = pytest.importorskip("transformers.generation.logits_process")
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(64, 50, generator=draw, dtype=torch.float64) * 3
    text = torch.randint(0, 50, (64, 20), generator=draw)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.3)(text, logits.clone())
    theirs = hf.TemperatureLogitsWarper(0.7)(text, theirs)
    theirs = hf.TopKLogitsWarper(30)(text, theirs)
    theirs = hf.TopPLogitsWarper(0.95)(text, theirs)
    theirs = hf.MinPLogitsWarper(0.02)(text, theirs).softmax(dim=-1)
    options = {"temperature": 0.7, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3}
    ours = next_probabilities(logits, Sampling(**options), text)
    assert ((ours > 0) == (theirs > 0)).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"min_p": 1.1}, "min_p 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty inf"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        generate(Fixed(LOGITS), [0], max_new_tokens=1, **arguments)
