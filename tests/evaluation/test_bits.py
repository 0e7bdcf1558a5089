"""Bits per byte, worked by hand on models whose probabilities are known."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gatewright.data.tokenizer import ByteTokenizer, train_bpe
from gatewright.evaluation import bits_per_byte, take_bytes
from gatewright.papers import switch

BYTES = np.ones(8, dtype=np.int64)


class Known(nn.Module):
    """Predicts the next token from the one before it alone: row t of `table` holds p(next | t)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(table.log())
        self.seen: list[list[list[int]]] = []
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor) -> Any:
        self.seen.append(tokens.tolist())
        self.modes.append(self.training)
        # A constant added to all logits of a place changes no probability.
        return SimpleNamespace(logits=self.logits[tokens] + 3.0)


# p = 1/2, 1/4, 1/8, 1/8: token t costs t + 1 bits, token 3 costs 3.
HALVES = torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(4, 4)
TOKENS = np.array([3, 0, 1, 2, 3, 0, 0, 1, 2, 2, 1])
# All but the first: 1 + 2 + 3 + 3 + 1 + 1 + 2 + 3 + 3 + 2.
COST = 21


@pytest.mark.parametrize("vocab_size", [2, 8, 257])
def test_a_uniform_model_costs_log2_of_the_vocabulary(vocab_size: int):
    model = Known(torch.full((vocab_size, vocab_size), 1 / vocab_size))
    tokens = np.arange(50) % vocab_size
    lengths = np.ones(vocab_size, dtype=np.int64)
    bits = bits_per_byte(model, {"a": tokens}, lengths, context=7, batch_size=3)
    assert bits.bits_per_byte == pytest.approx(math.log2(vocab_size), rel=1e-6)
    assert bits.nats_per_token == pytest.approx(math.log(vocab_size), rel=1e-6)
    assert bits.num_bytes == 49


@pytest.mark.parametrize("context", [1, 2, 3, 5, 7, 10, 11, 64])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_every_token_but_the_first_is_predicted_once_from_the_one_before(context: int, batch_size: int):
    model = Known(HALVES)
    bits = bits_per_byte(model, {"a": TOKENS}, BYTES, context=context, batch_size=batch_size)
    assert bits.bits_per_byte == pytest.approx(COST / 10, rel=1e-6)
    given = [token for batch in model.seen for window in batch for token in window]
    assert given == TOKENS[:-1].tolist()
    assert max(len(window) for batch in model.seen for window in batch) <= context
    assert max(len(batch) for batch in model.seen) <= batch_size


def test_targets_are_the_tokens_that_follow():
    # After t comes t + 1 (mod 4) with 1/2, t with 1/4, else 1/8: 0 1 2 2 0 1 costs 1 + 1 + 2 + 3 + 1.
    table = torch.full((4, 4), 0.125)
    for token in range(4):
        table[token, token], table[token, (token + 1) % 4] = 0.25, 0.5
    for context in (1, 2, 3, 8):
        tokens = np.array([0, 1, 2, 2, 0, 1])
        bits = bits_per_byte(Known(table), {"a": tokens}, BYTES, context=context, batch_size=2)
        assert bits.bits_per_byte == pytest.approx(8 / 5, rel=1e-6)


def test_bytes_are_those_that_tokens_stand_for_and_ends_cost_bits_alone():
    # Token 0 is an end of text, 1 a byte, 2 and 3 pieces of 3 and 4 bytes.
    lengths = np.array([0, 1, 3, 4])
    tokens = np.array([0, 2, 3, 1, 0, 2, 0])
    # Predicted: 2 3 1 0 2 0 = 3 + 3 + 2 + 1 + 3 + 1 bits on 3 + 4 + 1 + 0 + 3 + 0 bytes.
    bits = bits_per_byte(Known(HALVES), {"a": tokens}, lengths, context=4, batch_size=2)
    assert bits.num_bytes == 11
    assert bits.bits_per_byte == pytest.approx(13 / 11, rel=1e-6)
    assert bits.nats_per_token == pytest.approx(13 / 6 * math.log(2), rel=1e-6)


def test_domains_are_apart_and_the_whole_weighs_them_by_bytes():
    lengths = np.array([1, 1, 2, 0])
    texts = {"a": np.array([0, 0, 0, 0, 0]), "b": np.array([0, 2, 2])}
    # a: 4 bits on 4 bytes; b: 6 bits on 4 bytes. Nothing runs over from a to b.
    model = Known(HALVES)
    bits = bits_per_byte(model, texts, lengths, context=3, batch_size=9)
    assert bits.domains == pytest.approx({"a": 1.0, "b": 1.5}, rel=1e-6)
    assert bits.bits_per_byte == pytest.approx(10 / 8, rel=1e-6)
    texts = {"a": np.array([0] * 9), "b": np.array([0, 2, 2])}
    # Not the mean of the domains: (8 + 6) / (8 + 4).
    bits = bits_per_byte(model, texts, lengths, context=3, batch_size=9)
    assert bits.bits_per_byte == pytest.approx(14 / 12, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_without_gradients_and_left_as_it_was(training: bool):
    model = Known(HALVES).train(training)
    bits_per_byte(model, {"a": TOKENS}, BYTES, context=3, batch_size=2)
    assert model.modes == [False] * len(model.modes)
    assert model.training is training
    assert model.logits.grad is None


def test_the_precision_context_is_entered_for_each_batch():
    entered = []

    class Noted(nullcontext[None]):
        def __enter__(self) -> None:
            entered.append(1)

    model = Known(HALVES)
    bits_per_byte(model, {"a": TOKENS}, BYTES, context=3, batch_size=2, autocast=Noted())
    assert len(entered) == len(model.seen) == 3


def test_losses_are_summed_in_wider_numbers_than_bf16():
    model = Known(torch.full((4, 4), 0.25))
    model.logits.data = model.logits.data.bfloat16()
    tokens = np.zeros(4097, dtype=np.int64)
    # Equal logits are exact in bf16; a sum of 4096 losses in bf16 is not.
    bits = bits_per_byte(model, {"a": tokens}, BYTES, context=512, batch_size=8)
    assert bits.bits_per_byte == pytest.approx(2.0, rel=1e-5)


def test_a_text_of_one_token_predicts_nothing():
    model = Known(HALVES)
    bits = bits_per_byte(model, {"a": TOKENS[:1], "b": TOKENS}, BYTES, context=4, batch_size=2)
    assert bits.domains["a"] == 0.0
    assert bits.num_bytes == 10


def test_a_short_last_window_takes_no_capacity_from_or_for_others():
    settings = switch.Settings(width=16, num_heads=2, head_dim=8, num_experts=4, expert_width=8, context=8)
    torch.manual_seed(0)
    model = switch.build(settings)
    tokens = np.arange(12) % 257
    lengths = np.ones(257, dtype=np.int64)
    whole = bits_per_byte(model, {"a": tokens}, lengths, context=8, batch_size=4)
    parts = [
        bits_per_byte(model, {"a": p}, lengths, context=8, batch_size=4) for p in (tokens[:9], tokens[8:])
    ]
    nats = sum(part.nats_per_token * part.num_bytes for part in parts)
    assert whole.nats_per_token * whole.num_bytes == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize(
    ("num_bytes", "kept"), [(0, 1), (1, 2), (2, 3), (3, 3), (4, 5), (6, 5), (7, 6), (8, 6), (9, 6)]
)
def test_take_bytes_is_the_shortest_prefix_with_that_many_bytes(num_bytes: int, kept: int):
    lengths = np.array([0, 1, 2, 3])
    # Bytes so far: 0 1 3 3 6 7.
    tokens = np.array([0, 1, 2, 0, 3, 1])
    assert take_bytes(tokens, lengths, num_bytes).tolist() == tokens[:kept].tolist()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_byte_lengths_of_real_tokenizers_add_up_to_the_text(kind: str):
    text = "a naïve café, 東京 and a café again; a café, a naïve one " * 4
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe([text], 280)
    tokens = np.concatenate([[tokenizer.eot], tokenizer.encode(text), [tokenizer.eot]])
    uniform = Known(torch.full((tokenizer.vocab_size, tokenizer.vocab_size), 1 / tokenizer.vocab_size))
    bits = bits_per_byte(uniform, {"a": tokens}, tokenizer.byte_lengths, context=16, batch_size=4)
    assert bits.num_bytes == len(text.encode())
    by_hand = (len(tokens) - 1) * math.log2(tokenizer.vocab_size) / len(text.encode())
    assert bits.bits_per_byte == pytest.approx(by_hand, rel=1e-6)
