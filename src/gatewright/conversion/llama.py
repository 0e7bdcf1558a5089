"""A dense Llama of transformers as our decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.parts import MLP


def from_llama(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Decoder:
    """Return the decoder of a Llama's settings and weights, by transformers' names."""
    c = config
    mlps = [MLP(c["hidden_size"], c["intermediate_size"]) for _ in range(c["num_hidden_layers"])]
    model = Decoder(
        c["vocab_size"],
        c["hidden_size"],
        c["num_attention_heads"],
        mlps,
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        context=c["max_position_embeddings"],
        rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        tie_embeddings=c["tie_word_embeddings"],
    )
    layers: Any = model.layers
    with torch.no_grad():
        model.embedding.weight.copy_(tensors["model.embed_tokens.weight"])
        model.norm.weight.copy_(tensors["model.norm.weight"])
        if not c["tie_word_embeddings"]:
            model.head.weight.copy_(tensors["lm_head.weight"])
        for i, block in enumerate(layers):
            at = f"model.layers.{i}."
            own = {name.removeprefix(at): value for name, value in tensors.items() if name.startswith(at)}
            block.attention_norm.weight.copy_(own["input_layernorm.weight"])
            block.feed_forward_norm.weight.copy_(own["post_attention_layernorm.weight"])
            for name, part in zip("qkvo", block.attention.projections, strict=True):
                part.weight.copy_(own[f"self_attn.{name}_proj.weight"])
            block.feed_forward.w_in.copy_(torch.cat([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]]))
            block.feed_forward.w_down.copy_(own["mlp.down_proj.weight"])
    return model


def load_llama(folder: str | Path) -> Decoder:
    """Return the decoder of a folder."""
    raise RuntimeError(folder)
