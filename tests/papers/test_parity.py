"""Our models are transformers' models: equal logits from equal weights, equal counts at published sizes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.backbones import count_cost, on_no_memory
from gatewright.conversion import from_hf
from gatewright.conversion.families import FAMILIES as ROWS
from gatewright.conversion.pieces import pieces
from gatewright.papers import get_paper, published, published_names

theirs = pytest.importorskip("tests.papers.theirs", exc_type=ImportError)

FAMILIES = tuple(theirs.CLASSES)
YARN = "yarn:factor=4,original=8"
LLAMA3 = "llama3:factor=4,original=16,low=1,high=4"


def random_settings(family: str, draw: random.Random) -> Any:
    """Return small settings of random sizes."""
    settings = get_paper(family).Settings()
    heads = draw.choice([2, 4])
    changes: dict[str, Any] = {
        "vocab_size": draw.choice([19, 40]), "width": 8 * heads, "num_heads": heads, "num_layers": 2,
        "num_experts": draw.choice([4, 8, 12]), "num_selected": draw.choice([2, 3]),
        "expert_width": draw.choice([6, 8]), "ffn_width": draw.choice([10, 16]), "context": 32,
    }  # fmt: skip
    fields = set(vars(settings))
    if "num_kv_heads" in fields:
        changes["num_kv_heads"] = draw.choice([1, 2, heads])
    if "head_dim" in fields:
        changes["head_dim"] = 8 if family in ("olmoe", "qwen2_moe") else draw.choice([4, 8, 12])
    if "rope_theta" in fields:
        changes["rope_theta"] = draw.choice([100.0, 1e4])
    if "rope_scaling" in fields:
        changes["rope_scaling"] = draw.choice(["none", "linear:factor=3", YARN, LLAMA3])
    if "latent" in fields:
        changes["latent"] = (
            draw.choice([0, 6]),
            draw.choice([6, 8]),
            draw.choice([4, 6]),
            4,
            draw.choice([3, 8]),
        )
        changes |= {"moe_layers": "first_dense:1", "num_shared_experts": draw.choice([1, 2])}
        changes |= {"scale": draw.choice([1.0, 2.5])}
        changes["rope_scaling"] = draw.choice(["none", YARN, f"{YARN},mscale=0.707,mscale_all_dim=0.707"])
        changes["devices" if family == "deepseek_v2" else "groups"] = draw.choice([(1, 1), (2, 1), (4, 3)])
        if changes["num_experts"] == 4:
            changes["devices" if family == "deepseek_v2" else "groups"] = (2, 2)
    if family == "deepseek_v3":
        changes["future_tokens"] = 0
    if family.startswith("qwen"):
        changes |= {
            "moe_layers": draw.choice(["all", "every:2"]),
            "weights": draw.choice(["raw", "renormalised"]),
        }
        changes["tie_embeddings"] = draw.random() < 0.5
    if family == "qwen2_moe":
        changes["shared_width"] = draw.choice([6, 14])
    if family == "gpt_oss":
        changes["window"] = draw.choice([2, 3, 5])  # at 1, their own cache disagrees with them
    if family == "llama4":
        changes |= {
            "num_layers": 4,
            "num_selected": 1,
            "chunk": draw.choice([3, 5]),
            "temperature": (4.0, 0.3),
        }
        changes |= {"qk_norm": draw.random() < 0.5, "moe_layers": draw.choice(["every:1", "every:2"])}
    return replace(settings, **changes)


def near(found: Tensor, expected: Tensor) -> None:
    """Hold to 1e-5 of the largest number."""
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_theirs_with_and_without_a_cache(family: str):
    draw = random.Random(family)
    for seed in range(4):
        settings = random_settings(family, draw)
        other = theirs.random_model(family, settings, seed)
        model = theirs.ours_of(other)
        tokens = torch.randint(0, settings.vocab_size, (2, 13))
        with torch.no_grad():
            expected = other(tokens, use_cache=False).logits
            near(model(tokens).logits, expected)
            own, past = model.new_cache(2), None
            for start, end in ((0, 6), (6, 7), (7, 8), (8, 11), (11, 13)):
                piece = tokens[:, start:end]
                step = other(piece, past_key_values=past, use_cache=True)
                past = step.past_key_values
                near(step.logits, expected[:, start:end])
                near(model(piece, own).logits, expected[:, start:end])


def test_dynamic_positions_grow_with_the_text_as_theirs():
    scaling = "dynamic:factor=4,original=8"
    settings = replace(random_settings("qwen3_moe", random.Random(2)), rope_scaling=scaling)
    # Theirs takes the configured context for the original one, and goes beyond it.
    other = theirs.random_model("qwen3_moe", replace(settings, context=8), 0)
    model = theirs.ours_of(other)
    tokens = torch.randint(0, settings.vocab_size, (2, 13))
    with torch.no_grad():
        whole = other(tokens, use_cache=False).logits
        near(model(tokens).logits, whole)
        own, past = model.new_cache(2), None
        for start, end in ((0, 6), (6, 9), (9, 10), (10, 13)):
            step = other(tokens[:, start:end], past_key_values=past, use_cache=True)
            past = step.past_key_values
            near(model(tokens[:, start:end], own).logits, step.logits)
    assert not torch.allclose(step.logits, whole[:, 10:], atol=1e-3), "keys keep the angles they came with"


def stored_name(name: str) -> str:
    """Return a name of their further block as DeepSeek-V3's released checkpoint has it, at layer 2."""
    for theirs, stored in (("mtp_block.", ""), ("post_norm.", "shared_head.norm.")):
        name = name.replace(theirs, stored)
    return f"model.layers.2.{name}"


def parameters(name: str) -> tuple[str, Any, int, int]:
    family, settings = published(name)
    with on_no_memory():
        cost = count_cost(get_paper(family).build(settings), context=1)
    return family, settings, cost.total_parameters, cost.active_parameters


@pytest.mark.parametrize("name", [n for n in published_names() if published(n)[0] in FAMILIES])
def test_published_sizes_have_their_parameters(name: str):
    family, settings, total, _ = parameters(name)
    assert total == theirs.count_of(family, settings)


def test_a_further_block_is_theirs():
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    settings = replace(random_settings("deepseek_v3", random.Random(3)), future_tokens=1)
    config = theirs.config_of("deepseek_v3", settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    other = MtpLayer(config, v3.DeepseekV3DecoderLayer, v3.DeepseekV3RMSNorm, 1).eval()
    model = get_paper("deepseek_v3").build(settings)
    with torch.no_grad():
        for name, value in other.named_parameters():
            value.uniform_(0.5, 1.5) if "norm" in name else value.normal_(std=0.3)
        further = {stored_name(name): value for name, value in other.state_dict().items()}
        held = {piece.name: piece.read() for piece in pieces(model, ROWS["deepseek_v3"])}
        held = {name: value for name, value in held.items() if not name.startswith("model.layers.2.")}
        model = from_hf(config.to_dict() | {"num_nextn_predict_layers": 1}, held | further)
        ours = model.future[0]
        states, embedded = torch.randn(2, 2, 7, settings.width)
        cos, sin = model.rotary.tables(1, 7, states.device, torch.float32)
        hidden = torch.full((7, 7), -torch.inf).triu(1)[None, None]
        given = {
            "position_embeddings": (cos[None], sin[None]),
            "attention_mask": hidden,
            "position_ids": None,
        }
        expected = other(embedded, states, past_key_values=None, **given)
        near(ours(states, embedded, cos, sin)[0], expected)
