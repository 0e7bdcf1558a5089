"""A folder of transformers is opened with its own tokenizer, ends and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.conversion.gguf_file import read_gguf
from gatewright.errors import UserError
from gatewright.generation import Sampling
from gatewright.generation.chat import Chat
from gatewright.generation.opened import Opening, open_text_model
from gatewright.generation.writing import Writing, continue_text

transformers = pytest.importorskip("transformers")
small = pytest.importorskip("tests.conversion.small_gguf", exc_type=ImportError)


def saved(folder: Path, model: Any, template: str | None = small.TEMPLATE) -> Path:
    """Save a model of transformers with the tokenizer of the small GGUF file."""
    model.save_pretrained(folder)
    text = read_gguf(small.write(folder / "m.gguf", small.llama())).tokenizer
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }
    about |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def mixtral() -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    ids = {"vocab_size": len(small.TOKENS), "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.MixtralConfig(**sizes, **experts, **ids, max_position_embeddings=128)
    return transformers.MixtralForCausalLM(config).eval()


def test_a_folder_is_what_transformers_makes_of_it(tmp_path: Path):
    theirs = small.llama()
    opened = open_text_model(str(saved(tmp_path, theirs)), Opening())
    ids = torch.tensor([opened.prompt("the cafe 12")])
    with torch.no_grad():
        ours, wanted = opened.model(ids).logits, theirs(ids).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    # Its own end, and the tokenizer's end of text.
    assert opened.ends == {0, 2}
    assert opened.start == ()
    assert opened.step is None


def test_its_chat_template_gives_the_ids_of_transformers(tmp_path: Path):
    opened = open_text_model(str(saved(tmp_path, small.llama())), Opening())
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the <|im_end|> 12"}]
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    more = {"add_generation_prompt": True, "return_dict": False, "sanitize_control_tokens": True}
    ids = opened.chat_template().ids(messages)
    assert ids == theirs.apply_chat_template(messages, **more)
    assert opened.conversation(ids) == ids
    assert ids.count(2) == 2
    turn = Chat(opened, writing=Writing(5), system="be brief").ask("the <|im_end|> 12")
    assert turn.read_tokens == len(ids)


def test_a_sparse_folder_shows_its_routing(tmp_path: Path):
    opened = open_text_model(str(saved(tmp_path, mixtral(), template=None)), Opening())
    data = continue_text(opened, "the", Sampling(seed=1), Writing(6, show_routing=True))
    tokens = data["routing"]["tokens"]
    assert [len(token["experts"]) for token in tokens] == [2] * data["new_tokens"]
    assert {len(experts) for token in tokens for experts in token["experts"]} == {2}
    with pytest.raises(UserError, match="no chat template"):
        Chat(opened)


def test_an_encoder_decoder_continues_no_text(tmp_path: Path):
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1}
    config = transformers.T5Config(vocab_size=len(small.TOKENS), **sizes, feed_forward_proj="relu")
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(UserError, match="a EncoderDecoder continues no text"):
        continue_text(open_text_model(str(saved(tmp_path, model)), Opening()), "the", Sampling(), Writing(1))


def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path):
    small.llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        open_text_model(str(tmp_path), Opening())
