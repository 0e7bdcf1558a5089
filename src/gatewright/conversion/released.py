"""Settings of a run as a released architecture's configuration, or the reason why none has such a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gatewright.backbones import Decoder, RopeScaling, moe_pattern
from gatewright.conversion.configurations import ROPE_WORDS
from gatewright.conversion.families import FAMILIES, Family
from gatewright.errors import UserError

_PER_LAYER = ("num_experts", "num_selected", "expert_width", "ffn_width")
_EXPORTED = {family.paper: kind for kind, family in FAMILIES.items() if not family.settings}


def released_kind(paper: str, settings: Any) -> str:
    """Return the `model_type` that a paper's model is. Raises: UserError where no released one is like it."""
    if paper not in _EXPORTED:
        raise UserError(
            f"a run of {paper} cannot be exported: no architecture that transformers, vLLM or llama.cpp "
            f"reads is this model; allowed: runs of {', '.join(_EXPORTED)}"
        )
    pattern = moe_pattern(settings.moe_layers, settings.num_layers)
    if paper == "mixtral" and not any(pattern):
        return "llama"
    if paper in ("mixtral", "olmoe", "gpt_oss") and not all(pattern):
        _refuse(paper, f"moe_layers {settings.moe_layers!r}", "released ones have sparse layers only")
    return _EXPORTED[paper]


def released_config(paper: str, settings: Any, model: Decoder) -> dict[str, Any]:
    """Return config.json of a run's model, all words that readers of the classic layout ask for.

    Raises: UserError for what no released architecture can express.
    """
    kind, s = released_kind(paper, settings), settings
    family = FAMILIES[kind]
    for name in _PER_LAYER:
        value = getattr(s, name)
        if isinstance(value, tuple) and len(set(value)) > 1:
            _refuse(paper, f"{name} {value}", "released architectures have one size for all layers")
    _refuse_heads(kind, paper, s)
    known = {f.name for f in fields(s)}
    told: dict[str, Any] = {"model_type": kind, "architectures": [family.architecture]}
    for ours, theirs in family.keys.items():
        if ours in known:
            value = getattr(s, ours)
            told[theirs] = value[0] if isinstance(value, tuple) else value
    told |= {"num_key_value_heads": getattr(s, "num_kv_heads", s.num_heads), "hidden_act": "silu"}
    told |= {"tie_word_embeddings": model.tie_embeddings, "rms_norm_eps": model.norm.eps, **family.kept}
    return told | _sparse(kind, paper, s) | _latent(s) | rope_words(model)


def _refuse(paper: str, what: str, why: str) -> None:
    raise UserError(f"{what} of this run of {paper} cannot be exported: {why}; allowed: runs without it")


def _refuse_heads(kind: str, paper: str, s: Any) -> None:
    if kind in ("olmoe", "qwen2_moe") and s.head_dim * s.num_heads != s.width:
        _refuse(paper, f"head_dim {s.head_dim}", f"{kind} has width / num_heads, {s.width / s.num_heads:g}")
    if getattr(s, "num_shared_experts", 1) < 1:
        _refuse(paper, "num_shared_experts 0", f"{kind} has at least one")
    if kind == "llama4_text" and s.temperature[0] != int(s.temperature[0]):
        _refuse(paper, f"temperature {s.temperature[0]}", f"{kind} has whole numbers of tokens")


def _sparse(kind: str, paper: str, s: Any) -> dict[str, Any]:
    """Return which layers are sparse, and how experts are chosen."""
    rows = moe_pattern(s.moe_layers, s.num_layers)
    word, _, number = s.moe_layers.partition(":")
    if kind.startswith("qwen"):
        dense = [] if word == "every" else [i for i, row in enumerate(rows) if not row]
        step = int(number) if word == "every" else 1
        more = {"decoder_sparse_step": step, "mlp_only_layers": dense, "use_sliding_window": False}
        return {**more, "norm_topk_prob": s.weights == "renormalised"}
    if kind == "olmoe":
        return {"norm_topk_prob": False, "clip_qkv": None}
    if kind == "gpt_oss":
        return {"layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(s.num_layers)]}
    if kind == "llama4_text":
        step = int(number) if word == "every" else 1
        floor, share = s.temperature
        more = {"moe_layers": [i for i, row in enumerate(rows) if row], "interleave_moe_layer_step": step}
        more |= {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(s.num_layers)]}
        return {**more, "attn_temperature_tuning": True, "floor_scale": int(floor), "attn_scale": share}
    if not kind.startswith("deepseek"):
        return {}
    first = rows.index(True) if any(rows) else s.num_layers
    if not all(rows[first:]):
        _refuse(paper, f"moe_layers {s.moe_layers!r}", f"{kind} has dense layers at the begin only")
    groups = s.devices if kind == "deepseek_v2" else s.groups
    more = {
        "first_k_dense_replace": first,
        "n_group": groups[0],
        "topk_group": groups[1],
        "moe_layer_freq": 1,
    }
    if kind == "deepseek_v2":
        greedy = groups == (1, 1)
        return {
            **more,
            "topk_method": "greedy" if greedy else "group_limited_greedy",
            "scoring_func": "softmax",
        }
    return {**more, "num_nextn_predict_layers": s.future_tokens}


def _latent(s: Any) -> dict[str, Any]:
    if not hasattr(s, "latent"):
        return {}
    query, kv, plain, rotary, value = s.latent
    own = {"q_lora_rank": query or None, "kv_lora_rank": kv, "v_head_dim": value}
    return own | {"qk_nope_head_dim": plain, "qk_rope_head_dim": rotary}


def rope_words(model: Decoder) -> dict[str, Any]:
    """Return the words for a model's rotary positions, those of transformers 4, which all readers know."""
    scaling: RopeScaling = model.rotary.scaling
    if scaling.kind == "none":
        return {"rope_theta": model.rotary.theta, "rope_scaling": None}
    _, _, rest = str(scaling).partition(":")
    given = dict(word.split("=") for word in rest.split(","))
    told: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind}
    told |= {ROPE_WORDS.get(name, name): _number(name, value) for name, value in given.items()}
    return {"rope_theta": model.rotary.theta, "rope_scaling": told}


def _number(name: str, value: str) -> Any:
    number = float(value)
    if name == "truncate":
        return bool(number)
    return int(number) if name == "original" else number


def classic_config(config: Mapping[str, Any], family: Family, kind: str, model: Decoder) -> dict[str, Any]:
    """Return a released configuration with the words that readers of the classic layout ask for, also where
    transformers 5 wrote others; without those of a quantisation that is undone.
    """
    inner = config.get("text_config") if config.get("model_type") == "llama4" else None
    told = dict(inner or config)
    told.pop("quantization_config", None)
    told |= {"model_type": kind, "architectures": [family.architecture], **rope_words(model)}
    if "num_experts" in family.keys:
        word = family.keys["num_experts"]
        found = [told[name] for name in (word, "num_local_experts", "num_experts") if told.get(name)]
        told[word] = found[0]
    return told
