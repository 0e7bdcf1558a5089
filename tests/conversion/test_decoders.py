"""Released decoders are read whole: dense ones as transformers computes them, and faults in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gatewright
from gatewright.conversion import from_hf
from gatewright.errors import UserError
from gatewright.experiments.convert import convert

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "tied llama": ("Llama", {"tie_word_embeddings": True}),
    "stretched llama": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-4}),
    "windowed mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
}


def random_decoder(name: str, more: dict[str, Any]) -> Any:
    """Return a model of transformers with random weights that matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=1.2 * value.shape[-1] ** -0.5) if value.dim() > 1 else value.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("case", DENSE)
def test_dense_models_are_theirs(case: str):
    other = random_decoder(*DENSE[case])
    ours = from_hf(other.config.to_dict(), other.state_dict())
    tokens = torch.randint(0, 40, (2, 13))
    with torch.no_grad():
        expected = other(tokens, use_cache=False).logits
        assert float((ours(tokens).logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_decoder("Llama", {}).save_pretrained(tmp_path)
    return tmp_path


def test_load_reads_a_folder(folder: Path):
    model = gatewright.load(folder)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 40)
    assert model.origin.config["model_type"] == "llama"
    assert model.origin.tokenizer is None
    assert gatewright.load(folder, dtype="bf16").embedding.weight.dtype == torch.bfloat16
    assert "origin" not in "".join(model.state_dict())


def test_load_reads_a_run(tiny_run: Path):
    model = gatewright.load(tiny_run)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)
    assert model.origin.is_run
    assert model.origin.tokenizer.name == "bytes"


def test_load_reads_an_encoder_decoder(tmp_path: Path):
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
    other = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    other.save_pretrained(tmp_path)
    model = gatewright.load(tmp_path)
    source, target = torch.randint(1, 40, (2, 1, 7))
    with torch.no_grad():
        expected = other(input_ids=source, decoder_input_ids=target).logits
        assert torch.allclose(model(source, target).logits, expected, rtol=1e-5, atol=1e-5)
    assert model.origin.config["model_type"] == "t5"
    with pytest.raises(UserError, match="a t5 is not converted"):
        convert(tmp_path, tmp_path / "out")


def change(folder: Path, what: str) -> None:
    """Break a checkpoint in one way."""
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    config = json.loads((folder / "config.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "left":
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors[name].clone()
    elif what == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    elif what == "tied":
        config["tie_word_embeddings"] = True
    elif what == "kind":
        config["model_type"] = "llamas"
    elif what == "quantised":
        config["quantization_config"] = {"quant_method": "gptq"}
    else:
        config["hidden_act"] = "gelu"
    save_file(tensors, file)
    (folder / "config.json").write_text(json.dumps(config))


FAULTS = {
    "missing": r"tensor model\.layers\.1\.mlp\.up_proj\.weight is not there",
    "left": r"tensor model\.layers\.2\.mlp\.up_proj\.weight belongs nowhere",
    "shape": r"up_proj\.weight is \[55, 48\]; allowed: \[56, 48\]",
    "tied": r"lm_head\.weight differs from the embedding",
    "kind": r"model_type .llamas. is not read; did you mean .llama.",
    "quantised": "quantization_config of gptq",
    "activation": "hidden_act 'gelu' of llama; allowed: 'silu'",
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_checkpoint_that_does_not_fit_is_named(folder: Path, what: str):
    change(folder, what)
    with pytest.raises(UserError, match=FAULTS[what]):
        gatewright.load(folder)


def test_pickles_are_read_only_if_trusted(folder: Path):
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    expected = gatewright.load(folder)(torch.tensor([[1, 2]])).logits
    file.unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle; .*--trust"):
        gatewright.load(folder)
    assert torch.equal(gatewright.load(folder, trust=True)(torch.tensor([[1, 2]])).logits, expected)
