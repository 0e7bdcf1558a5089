"""A configuration of transformers as settings of this toolkit: sizes, positions, sparse layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gatewright.backbones import RopeScaling, moe_pattern
from gatewright.conversion.families import WINDOWED, Family, family_of, text_config
from gatewright.errors import UserError
from gatewright.papers import get_paper

ROPE_WORDS = {
    "original": "original_max_position_embeddings", "low": "low_freq_factor", "high": "high_freq_factor",
}  # fmt: skip
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")


@dataclass(frozen=True)
class Described:
    """What a configuration says: its family, the paper's settings, and what those have no field for: the
    norms' epsilon, stretched positions, a window of all layers, and whether Llama 4's temperature is on.
    """

    kind: str
    family: Family
    settings: Any
    eps: float
    rope_theta: float
    rope_scaling: str
    window: int | None = None
    tempered: bool = True


def describe(config: Mapping[str, Any], names: Collection[str] = ()) -> Described:
    """Return what a configuration says; `names` are the checkpoint's tensors, among which may be those of
    blocks that predict further tokens (DeepSeek-V3).

    Raises: UserError where a word is missing, or says what this toolkit has no model for.
    """
    family = family_of(config)
    told = {**family.defaults, **text_config(config)}
    kind = str(told["model_type"])
    known = {f.name for f in fields(get_paper(family.paper).Settings)}
    values: dict[str, Any] = dict(family.settings)
    for ours, theirs in family.keys.items():
        if ours in known:
            values[ours] = _word(told, theirs)
    _heads(kind, told, values, known)
    if not family.settings:
        values |= _sparse(kind, told, names)
    theta, scaling = rope_of(told, family.theta)
    if scaling.startswith("dynamic"):  # made for texts beyond the configured ones
        values["context"] = int(values["context"] * RopeScaling.parse(scaling).factor)
    more = {"rope_theta": theta, "rope_scaling": scaling}
    values |= {name: value for name, value in more.items() if name in known}
    return Described(
        kind,
        family,
        get_paper(family.paper).Settings(**values),
        float(told.get("rms_norm_eps", family.eps)),
        theta,
        scaling,
        told.get("sliding_window") if kind in WINDOWED else None,
        bool(told.get("attn_temperature_tuning", True)),
    )


def _word(told: Mapping[str, Any], name: str) -> Any:
    """Return a word of a configuration; some have one that stands for them."""
    if name == "tie_word_embeddings":
        return bool(told.get(name, False))
    if name in ("num_key_value_heads", "head_dim") and told.get(name) is None:
        heads = told.get("num_attention_heads", 1)
        return heads if name == "num_key_value_heads" else told.get("hidden_size", 0) // heads
    if name in _EXPERTS:  # one word in transformers' memory, several on the disk
        name = next((other for other in (name, *_EXPERTS) if told.get(other) is not None), name)
    if told.get(name) is None:
        raise UserError(f"config.json lacks {name}; allowed: the configuration that belongs to the tensors")
    return told[name]


def _heads(kind: str, told: Mapping[str, Any], values: dict[str, Any], known: set[str]) -> None:
    """Set head_dim where a family has no word for it, and refuse heads that the paper does not have."""
    if "latent" in known:
        ranks = (told.get("q_lora_rank") or 0, _word(told, "kv_lora_rank"))
        sizes = (_word(told, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        values["latent"] = (*ranks, *sizes)
    elif "head_dim" not in values:
        values["head_dim"] = values["width"] // values["num_heads"]
    if "num_kv_heads" not in known and _word(told, "num_key_value_heads") != values["num_heads"]:
        raise UserError(
            f"config.json: num_key_value_heads {told['num_key_value_heads']} of {kind} with "
            f"{values['num_heads']} heads; allowed: as many, as the released models have"
        )
    if told.get("partial_rotary_factor", 1) not in (1, 1.0, None):
        raise UserError(f"config.json: partial_rotary_factor of {kind}; allowed: 1, or none")


def _sparse(kind: str, told: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the settings of sparse layers: which they are, and how they choose."""
    num_layers = int(told["num_hidden_layers"])
    if kind.startswith("qwen"):
        step, dense = told.get("decoder_sparse_step", 1), set(told.get("mlp_only_layers") or ())
        rows = tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
        weights = "renormalised" if told.get("norm_topk_prob", False) else "raw"
        return {"moe_layers": pattern_of(rows), "weights": weights}
    if kind == "gpt_oss":
        kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(num_layers)]
        if (told.get("layer_types") or kinds) != kinds:
            raise UserError("config.json: layer_types of gpt_oss; allowed: sliding and full ones in turn")
    if kind == "llama4_text":
        return _llama4(told, num_layers)
    if not kind.startswith("deepseek"):
        return {}
    first = int(told.get("first_k_dense_replace", 0))
    found: dict[str, Any] = {"moe_layers": f"first_dense:{min(first, num_layers)}" if first else "all"}
    groups = (told.get("n_group") or 1, told.get("topk_group") or 1)
    if kind == "deepseek_v2":
        greedy = told.get("topk_method", "greedy") == "greedy"
        return found | {"devices": (1, 1) if greedy else groups}
    further = int(told.get("num_nextn_predict_layers") or 0)
    there = any(name.startswith(f"model.layers.{num_layers}.") for name in names)
    return found | {"groups": groups, "future_tokens": further if there else 0}


def _llama4(told: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    turned = [int((i + 1) % 4 != 0) for i in range(num_layers)]
    if (told.get("no_rope_layers") or turned) != turned:
        raise UserError("config.json: no_rope_layers of llama4_text; allowed: every fourth layer")
    step = int(told.get("interleave_moe_layer_step", 1))
    sparse = told.get("moe_layers")
    rows = tuple((i + 1) % step == 0 if sparse is None else i in sparse for i in range(num_layers))
    temperature = (float(told.get("floor_scale", 8192)), float(told.get("attn_scale", 0.1)))
    return {"moe_layers": pattern_of(rows), "temperature": temperature}


def pattern_of(rows: tuple[bool, ...]) -> str:
    """Return the name of a pattern of sparse layers. Raises: UserError where it has none."""
    numbers = range(1, len(rows) + 1)
    named = [f"{word}:{n}" for word in ("every", "first_dense", "last") for n in numbers]
    for name in ("all", "none", *named):
        if moe_pattern(name, len(rows)) == rows:
            return name
    sparse = ", ".join(str(i) for i, row in enumerate(rows) if row)
    raise UserError(
        f"sparse layers {sparse} of {len(rows)}; allowed: all, every N-th, all but the first N, the last N"
    )


def rope_of(told: Mapping[str, Any], theta: float) -> tuple[float, str]:
    """Return the base of the rotary positions and how they are stretched, as `RopeScaling.parse` takes it.

    Raises: UserError for kinds that are unknown, and for positions that differ between layers.
    """
    given = told.get("rope_parameters") or told.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UserError("config.json: rope_parameters per kind of layer; allowed: the same in all layers")
    base = float(given.get("rope_theta") or told.get("rope_theta") or theta)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind in ("default", None):
        return base, "none"
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise UserError(f"config.json: rope_type {kind!r}; allowed: default, linear, dynamic, yarn, llama3")
    words: dict[str, Any] = {"factor": given.get("factor", 1.0)}
    if kind != "linear":
        words["original"] = given.get(ROPE_WORDS["original"]) or told.get("max_position_embeddings")
    if kind == "llama3":
        words |= {name: given.get(ROPE_WORDS[name]) for name in ("low", "high")}
    if kind == "yarn":
        words |= {name: given[name] for name in _YARN if given.get(name) is not None}
    return base, f"{kind}:{','.join(f'{name}={float(value or 0):.17g}' for name, value in words.items())}"
