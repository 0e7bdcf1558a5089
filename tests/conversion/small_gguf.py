"""A small random Llama of transformers, and the GGUF file that llama.cpp would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gatewright.data.tokenizer import byte_alphabet

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(byte_alphabet())
MERGES = ["t h", "th e", "Ġ the", "1 2"]
TOKENS = [*CONTROL, *LETTERS, "th", "the", "Ġthe", "12"]
OF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama(tied: bool = True, **changes: Any) -> LlamaForCausalLM:
    """Return the model: widths of whole blocks of 32, so that its rows can be quantised."""
    torch.manual_seed(7)
    sizes = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlamaConfig(**(sizes | {"tie_word_embeddings": tied} | changes))
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def pairs_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of queries or keys as llama.cpp stores them: what a rotation turns stands side by side."""
    size = rows.shape[0] // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def write(path: Path, model: LlamaForCausalLM, kind: str = "F32", **more: Any) -> Path:
    """Write a model as GGUF, its matrices in a quantisation; `more` replaces what the file says of itself."""
    config, quantised = model.config, getattr(gguf.GGMLQuantizationType, kind)
    out = gguf.GGUFWriter(path, more.get("architecture", "llama"))
    out.add_name("small")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(5000.0)
    if "scaling" in more:
        out.add_rope_scaling_type(more["scaling"])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(more.get("pre", "smollm"))
    out.add_token_list(TOKENS)
    out.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    out.add_token_merges(MERGES)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(more.get("add_bos", False))
    if more.get("template", TEMPLATE):
        out.add_chat_template(more.get("template", TEMPLATE))
    for name, value in model.state_dict().items():
        own = gguf_name(name)
        if own == "output.weight" and config.tie_word_embeddings:
            continue
        rows = value.float().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        part = own.split(".")[-2]
        rows = pairs_together(rows, heads[part]) if part in heads else rows
        if rows.ndim == 1:
            out.add_tensor(own, rows)
        else:
            out.add_tensor(own, gguf.quantize(rows, quantised), raw_dtype=quantised)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def gguf_name(name: str) -> str:
    """Return GGUF's name of one of transformers' weights."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{OF_LAYER[rest.removesuffix('.weight')]}.weight"
