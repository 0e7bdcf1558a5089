"""Generation: the cache changes nothing, sampling is what it says, and no half character is shown."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gatewright.backbones import Decoder, DecoderOutput
from gatewright.data.tokenizer import ByteTokenizer, train_bpe
from gatewright.errors import RunFailure, UserError
from gatewright.generation import Sampling, TextStream, generate, next_probabilities, stream
from gatewright.kernels import native
from gatewright.papers import get_paper
from gatewright.parts import MLP, Capacity, MoELayer, Stats

PROMPT = [5, 250, 17, 3]


def build(paper: str = "mixtral", **changes: Any) -> Decoder:
    torch.manual_seed(1)
    file = get_paper(paper)
    small = {
        "width": 32,
        "head_dim": 16,
        "num_heads": 2,
        "num_experts": 8,
        "expert_width": 16,
        "context": 128,
    }
    model: Decoder = file.build(dataclasses.replace(file.Settings(), **small | changes))
    # Sharper than at initialisation: an untrained model answers nearly the same to everything.
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model.eval()


MODELS = {
    "moe, grouped queries": lambda: build(num_kv_heads=1),
    "olmoe": lambda: build("olmoe"),
    "switch, with capacity": lambda: build("switch", capacity_factor=0.5, num_layers=4),
    "dense": lambda: build(moe_layers="none", width=48),
}


@pytest.mark.parametrize(("name", "temperature"), [*((name, 0.0) for name in MODELS), ("olmoe", 1.0)])
def test_the_cache_changes_nothing(name: str, temperature: float):
    model = MODELS[name]()
    with_cache = generate(model, PROMPT, max_new_tokens=64, temperature=temperature)
    without = generate(model, PROMPT, max_new_tokens=64, temperature=temperature, cache=False)
    assert with_cache == without
    assert len(with_cache) == 64
    assert len(set(with_cache)) > 3
    with native.left_out():
        assert generate(model, PROMPT, max_new_tokens=64, temperature=temperature) == with_cache


@pytest.mark.parametrize("prompt_length", [1, 16, 40])
def test_a_text_longer_than_the_context_goes_on(prompt_length: int):
    model = build(context=16)
    prompt = [i % 256 for i in range(prompt_length)]
    new = generate(model, prompt, max_new_tokens=30, temperature=0)
    assert new == generate(model, prompt, max_new_tokens=30, temperature=0, cache=False)
    # By hand: whenever more than 16 ids are there, the last 8 are what is read.
    text, start = list(prompt), 0
    for expected in new:
        if len(text) - start > 16:
            start = len(text) - 8
        logits = model(torch.tensor([text[start:]])).logits[0, -1]
        assert int(logits.argmax()) == expected
        text.append(expected)


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert next_probabilities(logits, Sampling(temperature=0)).tolist() == [[0, 1, 0, 0]]


# Probabilities 0.1, 0.4, 0.2, 0.3: in falling order ids 1 (0.4), 3 (0.3), 2 (0.2), 0 (0.1).
BY_HAND = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        # 0.4 reaches 0.4: one id is enough. A hair more needs the second.
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        # top_k first: among 4/7 and 3/7, the first alone reaches 0.5.
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        # Temperature 1/2 squares: 1, 16, 4, 9 thirtieths; 16/30 reaches 0.5.
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),
    ],
)
def test_probabilities_by_hand(arguments: dict[str, Any], expected: list[float]):
    result = next_probabilities(BY_HAND, Sampling(**arguments))
    assert result.tolist() == pytest.approx(expected, abs=1e-7)


def test_equal_probabilities_keep_the_lowest_ids():
    result = next_probabilities(torch.zeros(4), Sampling(top_p=0.5))
    assert result.tolist() == [0.5, 0.5, 0, 0]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 0.999))
@settings(max_examples=100, deadline=None)
def test_top_p_is_the_smallest_set(logits: list[float], top_p: float):
    full = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0)
    kept = next_probabilities(torch.tensor(logits, dtype=torch.float64), Sampling(top_p=top_p)) > 0
    mass = float(full[kept].sum())
    assert mass >= top_p - 1e-9
    assert mass - float(full[kept].min()) < top_p
    assert float(full[kept].min()) >= float(full[~kept].max() if (~kept).any() else 0)


class Fixed(Decoder):
    """A decoder that answers the same logits to everything, and counts how often it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.shape[0], 4, 1, [MLP(4, 4)], context=512)
        self.answer, self.calls = logits, 0

    def forward(self, tokens: Tensor, cache: Any = None, capture: bool = False, **_: Any) -> DecoderOutput:
        self.calls += 1
        return DecoderOutput(self.answer.expand(*tokens.shape, -1), Stats())


def test_samples_follow_the_distribution():
    prompts = torch.zeros(500, 1, dtype=torch.int64)
    rows = generate(Fixed(BY_HAND), prompts, max_new_tokens=40, seed=3)
    counts = np.bincount(np.array(rows).reshape(-1), minlength=4) / 20_000
    # Standard error below 0.0035: five of them.
    assert counts == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.018)


def test_the_seed_decides_and_no_global_state_is_used():
    model = build()
    before = torch.get_rng_state().clone()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not move
    first = generate(model, PROMPT, max_new_tokens=20, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002
    torch.manual_seed(123)
    assert generate(model, PROMPT, max_new_tokens=20, seed=7) == first
    assert generate(model, PROMPT, max_new_tokens=20, seed=8) != first


def test_rows_of_a_batch_are_their_own():
    model = build()
    other = [9, 8, 7, 6]
    batch = generate(model, torch.tensor([PROMPT, other]), max_new_tokens=12, seed=2)
    assert batch[0] == generate(model, PROMPT, max_new_tokens=12, seed=2)
    assert batch[1] != batch[0]
    twice = generate(model, torch.tensor([PROMPT, PROMPT]), max_new_tokens=12, seed=2)
    assert twice[0] != twice[1]


def test_stop_ends_before_the_stop_id():
    model = build()
    free = generate(model, PROMPT, max_new_tokens=30, temperature=0)
    assert isinstance(free[0], int)
    end = free[10]
    assert generate(model, PROMPT, max_new_tokens=30, temperature=0, stop=[end]) == free[: free.index(end)]
    batch = generate(
        model, torch.tensor([PROMPT, [9, 8, 7, 6]]), max_new_tokens=30, temperature=0, stop=[end]
    )
    assert batch[0] == free[: free.index(end)]


def test_a_stream_gives_each_id_as_it_is_drawn():
    model = Fixed(BY_HAND)
    ids = stream(model, [0], max_new_tokens=5)
    assert model.calls == 0
    next(ids)
    assert model.calls == 1
    assert [*ids] == generate(Fixed(BY_HAND), [0], max_new_tokens=5)[1:]
    assert [*stream(model, [0], max_new_tokens=0)] == []


def test_an_abandoned_stream_leaves_the_model_as_it_was():
    model = build("switch", capacity_factor=0.5).train()
    ids = stream(model, PROMPT, max_new_tokens=5)
    next(ids)
    assert model.training
    capacities = [m.capacity for m in model.modules() if isinstance(m, MoELayer)]
    assert capacities == [Capacity(0.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "no tokens"),
        ({"tokens": [257]}, "token id 257; allowed: 0 to 256"),
        ({"tokens": [-1]}, "token id -1"),
        ({"tokens": [0.5]}, "integer"),
        ({"tokens": ["a"]}, "no ids|integer"),
        ({"tokens": torch.zeros(1, 1, 1, dtype=torch.int64)}, "shape"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": 0}, "top_k 0"),
        ({"seed": -1}, "seed -1"),
        ({"stop": [300]}, "stop id 300"),
    ],
)
@pytest.mark.parametrize("call", [generate, stream])
def test_mistakes_are_one_line_at_the_call(call: Any, changes: dict[str, Any], message: str):
    arguments = {"tokens": PROMPT, "max_new_tokens": 3} | changes
    with pytest.raises(UserError, match=message) as caught:
        call(build(), arguments.pop("tokens"), **arguments)
    assert "\n" not in str(caught.value)


def test_a_stream_takes_one_text():
    with pytest.raises(UserError, match="one text"):
        stream(build(), torch.tensor([PROMPT, PROMPT]), max_new_tokens=1)


def test_logits_that_are_not_finite_are_named():
    model = build()
    nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(RunFailure, match="not finite"):
        generate(model, PROMPT, max_new_tokens=1)


TEXT = "Grüße, 世界! 🙂🙂 naïve €5 · tab\tend"


def test_a_character_appears_when_it_is_whole():
    shown = TextStream(ByteTokenizer())
    # The euro sign is the bytes E2 82 AC, the smiling face F0 9F 99 82.
    assert [shown.push(i) for i in (0x61, 0xE2, 0x82, 0xAC, 0x62)] == ["a", "", "", "€", "b"]
    assert [shown.push(i) for i in (0xF0, 0x9F, 0x99, 0x82)] == ["", "", "", "🙂"]
    # Broken off by another character, and at the end.
    assert [shown.push(i) for i in (0xE2, 0x82, 0x61)] == ["", "", "\ufffda"]
    assert [shown.push(0xE2), shown.flush(), shown.flush()] == ["", "\ufffd", ""]


def metaspace_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s", "▁sat", "▁"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return inner, {word: i for i, word in enumerate(words)}


def test_a_leading_space_survives():
    inner, ids = metaspace_tokenizer()
    euro, face = ("<0xE2>", "<0x82>", "<0xAC>"), ("<0xF0>", "<0x9F>", "<0x99>", "<0x82>")
    given_ids = [ids[w] for w in ("▁the", "▁cat", "s", "▁", *euro, *face, *face, "▁sat")]
    shown = TextStream(inner)
    pieces = [shown.push(i) for i in given_ids]
    assert pieces == ["the", " cat", "s", " ", "", "", "€", *("", "", "", "🙂") * 2, " sat"]
    assert "".join(pieces) + shown.flush() == inner.decode(given_ids) == "the cats €🙂🙂 sat"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_pieces_are_the_text_and_hold_no_broken_character(kind: str):
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe([TEXT, "Grüße der Welt"] * 3, 270)
    ids = tokenizer.encode(TEXT).tolist()
    shown = TextStream(tokenizer)
    pieces = [shown.push(i) for i in [*ids, tokenizer.eot]]
    assert "".join(pieces) == TEXT
    assert shown.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_come_out_as_they_decode(raw: bytes):
    tokenizer = ByteTokenizer()
    shown = TextStream(tokenizer)
    pieces = [shown.push(i) for i in raw]
    assert "".join(pieces) + shown.flush() == tokenizer.decode(list(raw))
