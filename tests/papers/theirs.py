"""transformers' models beside ours: the same sizes from a configuration, the same weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from gatewright.backbones import on_no_memory
from gatewright.conversion import from_hf

CLASSES = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM"),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM"),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM"),
}
_ROPE = {"original": "original_max_position_embeddings", "low": "low_freq_factor", "high": "high_freq_factor"}


def rope_parameters(settings: Any) -> dict[str, Any]:
    """Return transformers' rope_parameters of our rope_theta and rope_scaling."""
    kind, _, rest = getattr(settings, "rope_scaling", "none").partition(":")
    theta = getattr(settings, "rope_theta", 10_000.0)
    given = dict(word.split("=") for word in rest.split(",") if word)
    told: dict[str, Any] = {_ROPE.get(name, name): float(value) for name, value in given.items()}
    if "truncate" in told:
        told["truncate"] = bool(told["truncate"])
    if "original_max_position_embeddings" in told:
        told["original_max_position_embeddings"] = int(told["original_max_position_embeddings"])
    return {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind, **told}


def _experts_of(family: str, s: Any) -> dict[str, Any]:
    pattern, _, number = s.moe_layers.partition(":")
    if family == "olmoe":
        return {"num_experts": s.num_experts, "intermediate_size": s.expert_width}
    if family in ("mixtral", "gpt_oss"):
        return {"num_local_experts": s.num_experts, "intermediate_size": s.expert_width}
    if family == "llama4":
        step = int(number or 1)
        sizes = {"intermediate_size": s.expert_width, "intermediate_size_mlp": s.ffn_width}
        return {"num_local_experts": s.num_experts, "interleave_moe_layer_step": step, **sizes}
    own = {"moe_intermediate_size": s.expert_width, "intermediate_size": s.ffn_width}
    if family in ("qwen2_moe", "qwen3_moe"):
        steps = {"decoder_sparse_step": int(number) if pattern == "every" else 1}
        more = {"norm_topk_prob": s.weights == "renormalised", "num_experts": s.num_experts}
        if family == "qwen2_moe":
            more["shared_expert_intermediate_size"] = s.shared_width
        return own | steps | more
    groups = s.groups if family == "deepseek_v3" else s.devices
    own |= {"n_routed_experts": s.num_experts, "n_shared_experts": s.num_shared_experts}
    own |= {"first_k_dense_replace": int(number or 0), "routed_scaling_factor": s.scale}
    own |= {"n_group": groups[0], "topk_group": groups[1]}
    if family == "deepseek_v2":
        own["topk_method"] = "greedy" if groups == (1, 1) else "group_limited_greedy"
    return own


def config_of(family: str, settings: Any) -> Any:
    """Return transformers' configuration of our settings."""
    s = settings
    fields: dict[str, Any] = {
        **_experts_of(family, s), "vocab_size": s.vocab_size, "hidden_size": s.width,
        "num_hidden_layers": s.num_layers, "num_attention_heads": s.num_heads,
        "num_key_value_heads": getattr(s, "num_kv_heads", s.num_heads),
        "num_experts_per_tok": s.num_selected, "max_position_embeddings": s.context,
        "rope_parameters": rope_parameters(s), "tie_word_embeddings": getattr(s, "tie_embeddings", False),
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if family in ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"):
        fields["rms_norm_eps"] = 1e-6
    if hasattr(s, "latent"):
        query, kv, plain, rotary, value = s.latent
        fields |= {"q_lora_rank": query or None, "kv_lora_rank": kv, "qk_nope_head_dim": plain}
        fields |= {"qk_rope_head_dim": rotary, "v_head_dim": value}
    elif family not in ("olmoe", "qwen2_moe"):
        fields["head_dim"] = s.head_dim
    if family == "gpt_oss":
        fields["sliding_window"] = s.window
    if family == "llama4":
        floor, share = s.temperature
        fields |= {"attention_chunk_size": s.chunk, "use_qk_norm": s.qk_norm}
        fields |= {"floor_scale": int(floor), "attn_scale": share}
    return getattr(transformers, CLASSES[family][0])(**fields)


def count_of(family: str, settings: Any) -> int:
    """Return how many parameters transformers' model of our settings has."""
    config = config_of(family, settings)
    with on_no_memory():
        model = getattr(transformers, CLASSES[family][1])(config)
    return sum(p.numel() for p in model.parameters())


def random_model(family: str, settings: Any, seed: int) -> Any:
    """Return transformers' model of our settings with random weights that matter."""
    torch.manual_seed(seed)
    config = config_of(family, settings)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, CLASSES[family][1])(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(std=1.2 * value.shape[-1] ** -0.5)
            else:
                value.uniform_(0.5, 1.5) if "norm" in name else value.normal_(std=0.3)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.normal_(std=0.3)
    return model


def ours_of(theirs: Any) -> nn.Module:
    """Return our model of their configuration with their weights."""
    return from_hf(theirs.config.to_dict(), theirs.state_dict())
