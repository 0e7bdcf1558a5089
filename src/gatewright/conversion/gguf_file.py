"""A GGUF file of the Llama architecture: its settings and weights under the names of transformers, its
tokenizer and its chat template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatewright.errors import UserError

_ALLOWED = "a GGUF file of the llama architecture, dense, as llama.cpp writes it"
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4
_DIGITS_APART = {"smollm": True, "gpt-2": False, "default": False}
"""How a text is cut before its merges, by the file's name for it: byte-level; some take each digit alone."""


@dataclass(frozen=True)
class GGUFModel:
    """What a file holds. `config` as transformers' config.json, `tensors` fp32 by transformers' names,
    `tokenizer` the text of a tokenizer.json; `special` {"bos_token": text, ...}; `start` are the ids before a
    text, `ends` those behind one; `template` is the chat template, None where there is none.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: str
    special: dict[str, str]
    start: tuple[int, ...]
    ends: tuple[int, ...]
    template: str | None


def read_gguf(path: str | Path) -> GGUFModel:
    """Return what a GGUF file holds, its quantised weights as the numbers that they stand for.

    Raises: UserError where there is no such file, or it holds another architecture or tokenizer.
    """
    path = Path(path)
    reader = _reader(path)
    held = {name: field.contents() for name, field in reader.fields.items()}
    architecture = held.get("general.architecture")
    if architecture != "llama" or held.get("llama.expert_count"):
        what = f"{architecture} with experts" if architecture == "llama" else str(architecture)
        raise UserError(f"{path} holds a model of the architecture {what}; allowed: {_ALLOWED}")
    tokens = held.get("tokenizer.ggml.tokens") or []
    names = {tensor.name for tensor in reader.tensors}
    config = _config(path, held, len(tokens), "output.weight" not in names)
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    special = {
        name: held.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
    }
    known = {name: int(place) for name, place in special.items() if place is not None}
    ends = {known.get("eos_token"), held.get("tokenizer.ggml.eot_token_id")}
    with_start = held.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in known
    return GGUFModel(
        name=str(held.get("general.name") or path.stem),
        config=config,
        tensors={_name(path, t.name): _weights(path, t, heads) for t in reader.tensors},
        tokenizer=_tokenizer(path, held),
        special={name: tokens[place] for name, place in known.items()},
        start=(known["bos_token"],) if with_start else (),
        ends=tuple(sorted(int(end) for end in ends if end is not None)),
        template=held.get("tokenizer.chat_template"),
    )


def _reader(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is no file; allowed: {_ALLOWED}; check the path")
    try:
        import gguf
    except ImportError:
        raise UserError(
            "gguf is not installed; allowed: gguf>=0.19; pip install 'gatewright[gguf]'"
        ) from None
    try:
        return gguf.GGUFReader(str(path))
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} is no GGUF file ({error}); allowed: {_ALLOWED}; check the file") from None


def _config(path: Path, held: dict[str, Any], num_tokens: int, tied: bool) -> dict[str, Any]:
    """Return the settings by the names of transformers' LlamaConfig."""

    def number(key: str, default: Any = None) -> Any:
        found = held.get(f"llama.{key}", default)
        if found is None:
            raise UserError(f"{path} lacks llama.{key}; allowed: {_ALLOWED}; check the file")
        return found

    scaling = held.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(f"{path} stretches positions by {scaling}; allowed: none; give an unstretched file")
    heads, width = int(number("attention.head_count")), int(number("embedding_length"))
    head_dim = int(number("attention.key_length", width // heads))
    turned = int(number("rope.dimension_count", head_dim))
    if turned != head_dim:
        raise UserError(f"{path} turns {turned} of {head_dim} numbers of a head; allowed: all; {_ALLOWED}")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": int(number("vocab_size", num_tokens)),
        "hidden_size": width,
        "intermediate_size": int(number("feed_forward_length")),
        "num_hidden_layers": int(number("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(number("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(number("context_length")),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(number("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }


def _shortest(number: float) -> float:
    """Return the number that was meant: the file keeps fp32, which has 9.99999975e-06 for 1e-05."""
    return float(str(np.float32(number)))


def _name(path: Path, given: str) -> str:
    """Return transformers' name of a tensor."""
    if given in _OUTER:
        return _OUTER[given]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", given)
    if found is None or found[2] not in _OF_LAYER:
        raise UserError(f"{path} holds the tensor {given}, which no dense Llama has; allowed: {_ALLOWED}")
    return f"model.layers.{found[1]}.{_OF_LAYER[found[2]]}.weight"


def _weights(path: Path, tensor: Any, heads: tuple[int, int]) -> Tensor:
    """Return a tensor's numbers in fp32, rows of queries and keys in transformers' order."""
    import gguf

    try:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"{tensor.name} of {path}: {error}; allowed: types that gguf reads, as F16, BF16, Q8_0, Q4_1"
        ) from None
    for part, count in (("attn_q", heads[0]), ("attn_k", heads[1])):
        if f".{part}." in tensor.name:
            numbers = halves_apart(numbers, count)
    # A copy: what came of an unquantised tensor is a view of the file.
    return torch.from_numpy(np.array(numbers, dtype=np.float32))


def halves_apart(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Return rows [H * head_dim, D] of queries or keys in the order of transformers.

    GGUF has the two numbers that a rotation turns beside each other, 0 0' 1 1' 2 2'; transformers has them
    half a head apart, 0 1 2 0' 1' 2'.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(path: Path, held: dict[str, Any]) -> str:
    """Return the tokenizer.json text of the file's vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, cut = held.get("tokenizer.ggml.model"), held.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or cut not in _DIGITS_APART:
        raise UserError(
            f"{path} has a tokenizer of kind {kind}, cut {cut}; allowed: byte-level BPE (gpt2), cut "
            f"{', '.join(_DIGITS_APART)}"
        )
    tokens: list[str] = held["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in held["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_APART[cut] else []
    inner.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    kinds: Iterable[int] = held.get("tokenizer.ggml.token_type", ())
    whole = [(AddedToken(token, normalized=False), what) for token, what in zip(tokens, kinds, strict=False)]
    inner.add_special_tokens([token for token, what in whole if what == _CONTROL])
    inner.add_tokens([token for token, what in whole if what == _USER_DEFINED])
    text: str = inner.to_str()
    return text
