"""Whole models of transformers made small, of every family with experts that can be."""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.conversion.families import classes

E, K, LAYERS, VOCAB = 6, 2, 2, 40
# What families call the same things; each configuration takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts", "top_k_experts"), K),
    **dict.fromkeys(("moe_top_k", "moe_topk"), K),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("num_hidden_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2),
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
    "max_position_embeddings": 64, "first_k_dense_replace": 0, "num_dense_layers": 0, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "enable_moe_block": True,
    "router_jitter_noise": 0.0,
    "linear_head_dim": 8, "linear_num_heads": 2, "decoder_sparse_step": 1, "moe_layer_start_index": 0,
}  # fmt: skip


OTHERS = ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7")
CLASS_OF = {
    "openai_privacy_filter": "OpenAIPrivacyFilterModel",
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
}
_SPARSE = {"mlp_layer_types": ["sparse"] * LAYERS}
_ATTEND = {"layer_types": ["full_attention"] * LAYERS}
MORE: dict[str, dict[str, Any]] = {
    "axk1": {"first_k_dense_replace": 0} | _SPARSE,
    "beam": _SPARSE | _ATTEND,
    "dbrx": {
        "d_model": 16, "n_heads": 2, "n_layers": LAYERS,
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": E, "moe_top_k": K, "hidden_size": 16},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    },
    "deepseek_ocr2": _SPARSE,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [12, 12],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": _ATTEND | {"mlp_only_layers": []},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "glm5_next": {"qk_rope_head_dim": 0} | _SPARSE,
    "gemma4": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 4},
    "granitemoehybrid": _ATTEND | {"mamba_n_heads": 4},
    "lfm2_moe": _ATTEND,
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "mimo_v2_flash": {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2} | _SPARSE | _ATTEND,
    "step3p7": _SPARSE | _ATTEND | {"sliding_window": 4},
    "unlimited_ocr": _SPARSE,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# How many routers a small model has, where it is not one per layer.
ROUTERS = {
    **dict.fromkeys(("axk2", "dots3_note", "ernie4_5_vl_moe", "glm4_moe_lite", "hy_v3", "hy_v4", "jamba"), 1),
    **dict.fromkeys(("kimi_linear", "laguna", "nemotron_h"), 1),
    "jetmoe": 4,
}
# Whose weights are not scores times one number per token, and why.
WEIGHTS_APART = {
    "diffusion_gemma": "a scale per expert",
    "gemma4": "a scale per expert",
    "phimoe": "a softmax over the near ones, for each choice anew",
}
# What transformers hands out as router_logits where that is not the logits of every router.
HANDED_OUT = {
    "deepseek_v4": "those of routers by a hash of the token are left out",
    "diffusion_gemma": "probabilities",
    "gemma4": "probabilities",
    "jetmoe": "beside them what its attention returns in third place",
}
# Families with a selection bias that attach_bias finds (not ZAYA, whose biases send tokens past the experts).
BIASED = (
    *(
        "afmoe",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "dots1",
    ),
    *(
        "dots3_note",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
    ),
    *(
        "glm5_next",
        "glm_moe_dsa",
        "hy_v3",
        "hy_v4",
        "inkling",
        "inkling2",
        "kimi_linear",
        "kolibri1",
        "laguna",
    ),
    *(
        "lfm2_moe",
        "longcat_flash",
        "mimo_v2_flash",
        "minimax_m2",
        "minimax_m3_vl",
        "muse_spark",
        "nemotron_h",
    ),
    *("solar_open", "step3p7"),
)


def every_family() -> list[str]:
    """Return the families whose experts take an implementation, and the others that are read."""
    return list(dict.fromkeys([family for family, _ in classes()] + list(OTHERS)))


def model_class(family: str) -> Any:
    """Return the class of a family's language model: with a head, else without, else the whole model."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    known = {name: value for name, value in vars(module).items() if getattr(value, "config_class", None)}
    if family in CLASS_OF:
        return known[CLASS_OF[family]]
    for ending in ("ForCausalLM", "TextModel", "Model"):
        found = [name for name in known if name.endswith(ending)]
        if found:
            return known[found[0]]
    raise AssertionError(f"{family} has no model")


def tiny_config(family: str, **more: Any) -> Any:
    """Return a small configuration of a family."""
    config_class = model_class(family).config_class
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= set(getattr(config_class, "attribute_map", {}))
    own = {**SIZES, **MORE.get(family, {}), **more}
    return config_class(**{name: value for name, value in own.items() if name in known})


def tiny_model(family: str, **more: Any) -> Any:
    """Return a small model of a family, with random weights that matter."""
    torch.manual_seed(0)
    model: nn.Module = model_class(family)(tiny_config(family, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model.eval()


@cache
def ids() -> Tensor:
    """Return two sequences of seven tokens."""
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
