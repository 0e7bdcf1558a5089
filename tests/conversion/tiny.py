"""Whole models of transformers made small, of every family with experts that can be."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conversion.families import classes

E, K, LAYERS, VOCAB = 6, 2, 2, 40
# What families call the same things; each configuration takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts", "top_k_experts", "moe_top_k", "moe_topk"), K),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("num_hidden_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2),
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
    "max_position_embeddings": 64, "first_k_dense_replace": 0, "num_dense_layers": 0, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "enable_moe_block": True,
    "router_jitter_noise": 0.0, "decoder_sparse_step": 1, "moe_layer_start_index": 0,
}  # fmt: skip


def causal_families() -> list[str]:
    """Return the families with a class of experts that takes an implementation, and a model of text alone."""
    families = dict.fromkeys(family for family, _ in classes())
    return [family for family in families if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def tiny_config(family: str, **more: Any) -> Any:
    """Return a small configuration of a family."""
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    known = {field.name for field in dataclasses.fields(config_class)} if dataclasses.is_dataclass(
        config_class
    ) else set(inspect.signature(config_class.__init__).parameters)
    known |= set(getattr(config_class, "attribute_map", {}))
    given = {name: value for name, value in {**SIZES, **more}.items() if name in known}
    return config_class(**given)


def tiny_model(family: str, **more: Any) -> Any:
    """Return a small model of a family, with random weights that matter."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    torch.manual_seed(0)
    model: nn.Module = model_class(tiny_config(family, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    with contextlib.suppress(AttributeError, ValueError):
        model.set_experts_implementation("eager")
    return model.eval()


@cache
def ids() -> Tensor:
    """Return two sequences of seven tokens."""
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
