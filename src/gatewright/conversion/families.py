"""The decoder families of transformers that can be read and written, one row each: what a configuration's
words mean here, and how its tensors are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gatewright.errors import UserError, did_you_mean


def _nothing() -> Any:
    return field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    `paper`: whose settings and build it has; a dense family is the paper with no sparse layer. `keys`: our
    setting -> the configuration's word. `defaults`: what transformers takes where a word is missing.
    `only`: words whose other values this toolkit cannot express. Tensors: `block` holds the feed-forward
    parts of a layer, `parts` are an expert's gate, up and down, `stacked` says that all experts of a layer
    are one transposed tensor, with gate and up "halves" or "interleaved".
    """

    architecture: str
    paper: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any] = _nothing()
    only: Mapping[str, tuple[Any, ...]] = _nothing()
    settings: Mapping[str, Any] = _nothing()
    theta: float = 10_000.0
    eps: float = 1e-6
    block: str = "mlp"
    router: str = "gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"
    stacked: str = ""
    kept: Mapping[str, Any] = _nothing()
    """words that an exported configuration states besides `keys`"""


_SIZES = {
    "vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "context": "max_position_embeddings",
}  # fmt: skip
_HEADS = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_TIED = {"tie_embeddings": "tie_word_embeddings"}
_DENSE = _SIZES | _HEADS | _TIED | {"ffn_width": "intermediate_size"}
_LOCAL = {"num_experts": "num_local_experts", "num_selected": "num_experts_per_tok"}
_OWN = {"num_experts": "num_experts", "num_selected": "num_experts_per_tok"}
_ROUTED = {"num_experts": "n_routed_experts", "num_selected": "num_experts_per_tok"}
_WIDTHS = {"expert_width": "moe_intermediate_size", "ffn_width": "intermediate_size"}
_LATENT = {"num_shared_experts": "n_shared_experts", "scale": "routed_scaling_factor"}
_NO = (False, None)
_SILU = {"hidden_act": ("silu",)}
_PLAIN = _SILU | {"attention_bias": _NO, "mlp_bias": _NO, "use_sliding_window": _NO}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "mixtral": Family(
            "MixtralForCausalLM", "mixtral",
            _SIZES | _HEADS | _TIED | _LOCAL | {"expert_width": "intermediate_size"},
            {"num_key_value_heads": 8}, _PLAIN, theta=1e6, eps=1e-5, block="block_sparse_moe",
            parts=("w1", "w3", "w2"),
        ),
        "olmoe": Family(
            "OlmoeForCausalLM", "olmoe", _SIZES | _TIED | _OWN | {"expert_width": "intermediate_size"},
            only=_PLAIN | {"clip_qkv": (None,), "norm_topk_prob": _NO}, eps=1e-5,
        ),
        "qwen2_moe": Family(
            "Qwen2MoeForCausalLM", "qwen2_moe",
            _SIZES | _HEADS | _TIED | _OWN | _WIDTHS | {"shared_width": "shared_expert_intermediate_size"},
            only=_PLAIN | {"qkv_bias": (True,)}, shared="shared_expert",
        ),
        "qwen3_moe": Family(
            "Qwen3MoeForCausalLM", "qwen3_moe", _SIZES | _HEADS | _TIED | _OWN | _WIDTHS, only=_PLAIN,
        ),
        "deepseek_v2": Family(
            "DeepseekV2ForCausalLM", "deepseek_v2", _SIZES | _ROUTED | _WIDTHS | _LATENT,
            only=_SILU | {"attention_bias": _NO, "norm_topk_prob": _NO, "moe_layer_freq": (1,),
                          "scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy"),
                          "tie_word_embeddings": _NO},
            kept={"norm_topk_prob": False},
        ),
        "deepseek_v3": Family(
            "DeepseekV3ForCausalLM", "deepseek_v3", _SIZES | _ROUTED | _WIDTHS | _LATENT,
            only=_SILU | {"attention_bias": _NO, "norm_topk_prob": (True,), "moe_layer_freq": (1,),
                          "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",),
                          "rope_interleave": (True,), "tie_word_embeddings": _NO},
            kept={"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        ),
        "gpt_oss": Family(
            "GptOssForCausalLM", "gpt_oss",
            _SIZES | _HEADS | _TIED | _LOCAL
            | {"expert_width": "intermediate_size", "window": "sliding_window"},
            {"head_dim": 64, "num_key_value_heads": 8},
            only=_SILU | {"attention_bias": (True,), "swiglu_limit": (7, 7.0), "swiglu_alpha": (1.702,)},
            theta=150_000.0, eps=1e-5, router="router", stacked="interleaved",
            kept={"attention_bias": True, "swiglu_limit": 7.0},
        ),
        "llama4_text": Family(
            "Llama4ForCausalLM", "llama4",
            _SIZES | _HEADS | _LOCAL
            | {"expert_width": "intermediate_size", "ffn_width": "intermediate_size_mlp",
               "chunk": "attention_chunk_size", "qk_norm": "use_qk_norm"},
            {"head_dim": 128, "num_key_value_heads": 8, "attention_chunk_size": 8192, "use_qk_norm": True},
            only=_SILU | {"attention_bias": _NO, "tie_word_embeddings": _NO, "no_rope_layer_interval": (4,)},
            theta=500_000.0, eps=1e-5, block="feed_forward", router="router", shared="shared_expert",
            stacked="halves",
        ),
        "llama": Family("LlamaForCausalLM", "mixtral", _DENSE, only=_PLAIN, settings={"moe_layers": "none"}),
        "mistral": Family(
            "MistralForCausalLM", "mixtral", _DENSE, {"num_key_value_heads": 8, "sliding_window": 4096},
            _PLAIN, settings={"moe_layers": "none"},
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM", "qwen2_moe", _DENSE, only=_PLAIN, settings={"moe_layers": "none"},
        ),
        "qwen3": Family(
            "Qwen3ForCausalLM", "qwen3_moe", _DENSE, {"head_dim": 128}, _PLAIN,
            settings={"moe_layers": "none"},
        ),
    }
)  # fmt: skip
# Families whose windows the paper's own settings do not have; those of others are a setting, or refused.
WINDOWED = ("mixtral", "mistral")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the text part: `config` itself, but where images stand beside it."""
    inner = config.get("text_config")
    return (
        {**inner, "model_type": "llama4_text"} if config.get("model_type") == "llama4" and inner else config
    )


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the row of a configuration's `model_type`. Raises: UserError for others, and for words whose
    values the toolkit cannot express.
    """
    kind = str(text_config(config).get("model_type"))
    if kind not in FAMILIES:
        raise UserError(
            f"model_type {kind!r} is not read{did_you_mean(kind, FAMILIES)}; allowed: {', '.join(FAMILIES)}, "
            "t5, switch_transformers"
        )
    family = FAMILIES[kind]
    for word, allowed in family.only.items():
        found = text_config(config).get(word, allowed[0])
        if found not in allowed:
            raise UserError(
                f"config.json: {word} {found!r} of {kind}; allowed: "
                f"{' or '.join(map(repr, allowed))}; this toolkit has no model with another"
            )
    return family
