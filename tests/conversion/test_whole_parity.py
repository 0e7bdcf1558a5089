"""Random small models of every family, odd in every count: padding, gradients and generation are theirs."""

from __future__ import annotations

import copy
import random
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatewright.conversion import FAMILIES, from_hf, read_padded
from gatewright.conversion.pieces import pieces
from gatewright.conversion.stored import Stored
from gatewright.errors import UserError
from gatewright.generation import generate

theirs = pytest.importorskip("tests.papers.theirs", exc_type=ImportError)
parity = pytest.importorskip("tests.papers.test_parity", exc_type=ImportError)

NAMES = [*theirs.CLASSES, "llama"]
CONTEXT = 96


def odd_model(family: str, seed: int = 0) -> Any:
    """Return a model of transformers: 3 heads, 5 experts, 23 ids, tied where that exists, 96 positions."""
    if family == "llama":
        return odd_llama(seed)
    settings = parity.random_settings(family, random.Random(f"{family} {seed}"))
    changes: dict[str, Any] = {
        "vocab_size": 23, "width": 24, "num_heads": 3, "num_experts": 5, "context": CONTEXT,
    }  # fmt: skip
    changes |= {"num_kv_heads": 1 + 2 * seed} if hasattr(settings, "num_kv_heads") else {}
    changes |= {"tie_embeddings": seed == 0} if hasattr(settings, "tie_embeddings") else {}
    changes |= {name: (1, 1) for name in ("groups", "devices") if hasattr(settings, name)}
    return theirs.random_model(family, replace(settings, **changes), seed)


def odd_llama(seed: int) -> Any:
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": 23, "hidden_size": 24, "intermediate_size": 14, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1 + 2 * seed, "head_dim": 6}
    rope = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.LlamaConfig(
        **sizes, **heads, **ends, rope_parameters=rope, max_position_embeddings=CONTEXT,
        tie_word_embeddings=seed == 0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=1.2 * value.shape[-1] ** -0.5) if value.dim() > 1 else value.uniform_(0.5, 1.5)
    return model


def batch(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return tokens of texts padded on the left, and their mask."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(zlib.crc32(bytes(lengths)))
    tokens = torch.randint(0, 23, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0), mask


def positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_texts_padded_on_the_left_have_their_logits(family: str, seed: int):
    other = odd_model(family, seed)
    ours = theirs.ours_of(other)
    tokens, mask = batch((4, 11, 7, 4))
    given = {"attention_mask": mask.long(), "position_ids": positions(mask)}
    with torch.no_grad():
        expected = other(tokens, use_cache=False, **given).logits
        if family == "llama4":  # their temperatures count padding as text; alone, a text has none
            for row, (text, own) in enumerate(zip(tokens, mask, strict=True)):
                expected[row, own] = other(text[own][None], use_cache=False).logits[0]
        found = read_padded(ours, tokens, mask)
    parity.near(found[mask], expected[mask])
    assert not found[~mask].any()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_theirs(family: str, seed: int):
    other = odd_model(family, seed)
    ours = from_hf(other.config.to_dict(), other.state_dict())
    tokens, targets = torch.randint(0, 23, (2, 2, 11))
    for logits in (other(tokens, use_cache=False).logits, ours(tokens).logits):
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    held = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    stored = Stored(held)
    kind = other.config.model_type
    compared = 0
    for piece in pieces(_as_gradients(ours), FAMILIES[kind]):
        if piece.name.endswith("e_score_correction_bias"):
            continue  # no gradient reaches it
        found, expected = piece.read(), stored.take(piece.name, piece.shape)
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max()) + 1e-9, piece.name
        compared += 1
    stored.finish(tied=False)
    assert compared > 10


def _as_gradients(model: Any) -> Any:
    """Return a copy of the model that holds gradients in place of weights."""
    turned = copy.deepcopy(model)
    with torch.no_grad():
        for own, given in zip(turned.parameters(), model.parameters(), strict=True):
            own.copy_(torch.zeros_like(own) if given.grad is None else given.grad)
    return turned


@pytest.mark.parametrize("family", NAMES)
def test_greedy_texts_are_theirs_over_64_steps(family: str):
    other = odd_model(family, seed=1)
    ours = theirs.ours_of(other)
    tokens, mask = batch((9, 5))
    given = {"attention_mask": mask.long(), "max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    expected = other.generate(tokens, **given)[:, tokens.shape[1] :].tolist()
    for text, own, wanted in zip(tokens, mask, expected, strict=True):
        assert generate(ours, text[own], max_new_tokens=64, temperature=0) == wanted
    # The last of the two, without a cache: the whole text is read anew for each id.
    assert generate(ours, text[own], max_new_tokens=64, temperature=0, cache=False) == wanted
    assert max(len(set(text)) for text in expected) > 4, "a text of one id shows little"


def test_padding_has_no_holes():
    ours = theirs.ours_of(odd_model("olmoe"))
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(UserError, match="a mask with a hole"):
        read_padded(ours, tokens, torch.tensor([[1, 0, 1]]))
    with pytest.raises(UserError, match="equal shapes"):
        read_padded(ours, tokens, torch.tensor([[1, 1]]))
    right = read_padded(ours, tokens, torch.tensor([[1, 1, 0]]))
    assert torch.equal(right[:, :2], ours(tokens[:, :2]).logits)
