"""The files beside the weights: tokenizer and generation settings, copied or written for a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatewright.conversion.gguf_file import GGUFModel
from gatewright.conversion.source import BESIDE

_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_beside(source: Path, target: Path, config: Mapping[str, Any]) -> list[str]:
    """Copy a folder's tokenizer and generation settings, and return their names; generation_config.json is
    written from config.json's ids where there is none.
    """
    copied = [name for name in BESIDE if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    if "generation_config.json" not in copied:
        write_json(target / "generation_config.json", {name: config.get(name) for name in _ENDS})
    return copied


def write_beside(target: Path, tokenizer: str, end: int, config: dict[str, Any]) -> None:
    """Write a run's tokenizer.json (`tokenizer`), tokenizer_config.json and generation_config.json, and put
    the id `end`, that separates documents, into `config`.
    """
    told = json.loads(tokenizer)
    ends = [token["content"] for token in told.get("added_tokens") or [] if token["id"] == end]
    known = {"eos_token": ends[0], "bos_token": ends[0]} if ends else {}
    # A text begins behind the end of another: in training that is what stood there.
    if ends and told.get("post_processor") is None:
        told["post_processor"] = begins_with(ends[0], end)
        known["add_bos_token"] = True
    (target / "tokenizer.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    longest = {"model_max_length": config["max_position_embeddings"]}
    write_json(target / "tokenizer_config.json", {**kind, **known, **longest})
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    config |= ids
    write_json(target / "generation_config.json", ids)


def write_of_gguf(target: Path, held: GGUFModel, config: dict[str, Any]) -> None:
    """Write a GGUF file's tokenizer.json, tokenizer_config.json with its chat template, and
    generation_config.json, and put the ids that begin and end a text into `config`.
    """
    told = json.loads(held.tokenizer)
    if held.start:
        told["post_processor"] = begins_with(held.special["bos_token"], held.start[0])
    (target / "tokenizer.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **held.special}
    settings |= {"add_bos_token": bool(held.start), "model_max_length": config["max_position_embeddings"]}
    if held.template is not None:
        settings["chat_template"] = held.template
    write_json(target / "tokenizer_config.json", settings)
    numbers = told["model"]["vocab"]
    ids = {f"{name}_id": numbers[text] for name, text in held.special.items()}
    config |= {name: ids.get(name) for name in _ENDS}
    ends = list(held.ends) if len(held.ends) > 1 else config["eos_token_id"]
    write_json(target / "generation_config.json", {**ids, "eos_token_id": ends})


def begins_with(token: str, number: int) -> dict[str, Any]:
    """Return the part of a tokenizer.json that puts a special token before every text."""
    first: dict[str, Any] = {"SpecialToken": {"id": token, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def bytes_tokenizer(alphabet: Mapping[str, int], end: int, end_text: str) -> str:
    """Return a tokenizer.json of single bytes: the 256 characters of the byte-level alphabet, without merges,
    and the end of text.
    """
    vocabulary = dict(sorted(alphabet.items(), key=lambda pair: pair[1]))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    token = {"id": end, "content": end_text, "single_word": False, "lstrip": False, "rstrip": False}
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
        "merges": [],
    }  # fmt: skip
    told = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [token | {"normalized": False, "special": True}], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model,
    }  # fmt: skip
    return json.dumps(told, ensure_ascii=False)


def write_json(path: Path, told: Mapping[str, Any]) -> None:
    """Write a mapping as a JSON file."""
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
