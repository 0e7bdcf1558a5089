"""`convert` writes every family in the classic layout, whatever it reads, and leaves nothing half done."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gatewright
from gatewright.cli import main
from gatewright.conversion import shards
from gatewright.conversion.files import TensorFiles
from gatewright.conversion.released import released_config
from gatewright.conversion.stored import from_fp8, from_mxfp4
from gatewright.conversion.verify import check_bits
from gatewright.data.tokenizer import ByteTokenizer, beginning_of_text, load_tokenizer
from gatewright.errors import RunFailure, UserError
from gatewright.experiments.convert import ConvertRun, convert
from gatewright.papers import get_paper

theirs = pytest.importorskip("tests.papers.theirs", exc_type=ImportError)
parity = pytest.importorskip("tests.papers.test_parity", exc_type=ImportError)

VERIFIED = ConvertRun(verify=True)


def random_model(family: str, seed: int = 1, **changes: Any) -> Any:
    settings = replace(parity.random_settings(family, random.Random(f"{family}{seed}")), **changes)
    return theirs.random_model(family, settings, seed)


def same(one: Path, other: Path) -> None:
    a, b = TensorFiles(one), TensorFiles(other)
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", theirs.CLASSES)
def test_fused_files_become_the_released_ones(family: str, tmp_path: Path):
    model = random_model(family)
    model.save_pretrained(tmp_path / "released")
    model.save_pretrained(tmp_path / "fused", save_original_format=False, max_shard_size="20KB")
    assert len(list((tmp_path / "fused").glob("*.safetensors"))) > 1
    found = convert(tmp_path / "fused", tmp_path / "out", VERIFIED)
    assert found.logits is not None
    assert found.logits < 1e-5
    same(tmp_path / "out", tmp_path / "released")
    # What our own reader of configurations and writer of them say agrees.
    ours = gatewright.load(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["rope_theta"] == ours.rotary.theta


def test_shards_have_an_index_that_transformers_reads(tmp_path: Path):
    import transformers

    model = random_model("olmoe")
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    split = [[e] for e in _entries(tmp_path / "in")]
    assert shards.split(_entries(tmp_path / "in"), 1) == split, "a tensor above the limit stands alone"
    found = convert(tmp_path / "in", tmp_path / "out", ConvertRun(shard_mb=1, dtype="bf16"))
    assert found.files == 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    other = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert other.dtype == torch.bfloat16
    assert torch.equal(other.lm_head.weight, model.lm_head.weight.bfloat16())


def _entries(folder: Path) -> list[shards.Entry]:
    tensors = TensorFiles(folder)
    return [shards.Entry(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in tensors]


def test_turned_experts_are_turned_back(tmp_path: Path):
    model = random_model("qwen3_moe", expert_width=6, width=16, num_heads=2)
    model.save_pretrained(tmp_path / "released")
    model.save_pretrained(tmp_path / "turned", save_original_format=False)
    file = tmp_path / "turned" / "model.safetensors"
    held = load_file(file)
    save_file({n: v.mT.contiguous() if v.dim() == 3 else v for n, v in held.items()}, file)
    convert(tmp_path / "turned", tmp_path / "out", VERIFIED)
    same(tmp_path / "out", tmp_path / "released")


def test_fp8_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.5], [4.0, 448.0, 1.0]]).to(torch.float8_e4m3fn)
    # Blocks of 1 x 2: the third column has a block of its own.
    scale = torch.tensor([[0.5, 4.0], [2.0, 0.25]])
    expected = torch.tensor([[0.5, -1.0, 2.0], [8.0, 896.0, 0.25]])
    assert torch.equal(from_fp8(weight, scale, (1, 2)), expected)
    with pytest.raises(UserError, match=r"FP8 scales of \[2, 2\].*one for each block"):
        from_fp8(weight, scale, (1, 1))


def test_fp8_files_are_read_and_written_as_bf16(tmp_path: Path):
    model = random_model("deepseek_v3")
    model.save_pretrained(tmp_path / "in")
    file, config = tmp_path / "in" / "model.safetensors", tmp_path / "in" / "config.json"
    held, expected = load_file(file), {}
    for name, value in list(held.items()):
        if name.endswith("_proj.weight"):
            rows, columns = (-(-n // 4) for n in value.shape)
            scale = torch.rand(rows, columns) + 0.5
            held[name] = value.to(torch.float8_e4m3fn)
            held[f"{name}_scale_inv"] = scale
            wide = scale.repeat_interleave(4, 0)[: value.shape[0]].repeat_interleave(4, 1)
            expected[name] = (held[name].float() * wide[:, : value.shape[1]]).bfloat16()
    save_file(held, file)
    told = json.loads(config.read_text())
    told["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    config.write_text(json.dumps(told))
    convert(tmp_path / "in", tmp_path / "out", ConvertRun(verify=True))
    found = TensorFiles(tmp_path / "out")
    assert expected
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any("scale" in name for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_mxfp4_by_hand():
    # 0x91: low half 1 is 0.5, high half 9 is -0.5; 0x7F: low half 15 is -6, high half 7 is 6.
    blocks = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0], blocks[0, 0, 1, 15] = 0x91, 0x7F
    found = from_mxfp4(blocks, torch.tensor([[[128, 126]]], dtype=torch.uint8))
    expected = torch.zeros(1, 1, 64)
    expected[0, 0, 0], expected[0, 0, 1] = 0.5 * 2, -0.5 * 2
    expected[0, 0, 62], expected[0, 0, 63] = -6 / 2, 6 / 2
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), expected)


def test_mxfp4_files_are_what_transformers_makes_of_them(tmp_path: Path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = random_model("gpt_oss", width=32, num_heads=4, expert_width=32)
    model.save_pretrained(tmp_path / "in")
    file, config = tmp_path / "in" / "model.safetensors", tmp_path / "in" / "config.json"
    held, expected = load_file(file), {}
    for name in [n for n, v in held.items() if v.dim() == 3]:
        num_experts, inner, outer = held.pop(name).shape
        blocks = torch.randint(0, 256, (num_experts, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (num_experts, outer, inner // 32), dtype=torch.uint8)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(held, file)
    told = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    config.write_text(json.dumps(told))
    convert(tmp_path / "in", tmp_path / "out", VERIFIED)
    found = TensorFiles(tmp_path / "out")
    assert len(expected) == 4
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_text_part_is_taken_out_of_a_model_with_images(tmp_path: Path):
    model = random_model("llama4")
    model.save_pretrained(tmp_path / "text")
    file, config = tmp_path / "in" / "model.safetensors", tmp_path / "in" / "config.json"
    file.parent.mkdir()
    held = {f"language_model.{n}": v for n, v in load_file(tmp_path / "text" / file.name).items()}
    save_file(held | {"vision_model.patch.weight": torch.ones(2)}, file)
    told = json.loads((tmp_path / "text" / "config.json").read_text())
    config.write_text(json.dumps({"model_type": "llama4", "text_config": told, "vision_config": {}}))
    found = convert(tmp_path / "in", tmp_path / "out", VERIFIED)
    assert (found.kind, found.left_out) == ("llama4_text", ("vision_model.patch.weight",))
    assert "left out: 1 tensors of images, as vision_model.patch.weight" in found.to_text()
    same(tmp_path / "out", tmp_path / "text")


def test_a_run_becomes_a_checkpoint(tiny_run: Path, tmp_path: Path):
    import transformers

    found = convert(tiny_run, tmp_path / "out", VERIFIED)
    assert found.kind == "mixtral"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    text = "Grüße, \n\x00 𝛑 "
    # Behind the end of another text, as in training.
    assert tokenizer(text)["input_ids"] == [ByteTokenizer.eot, *ByteTokenizer().encode(text).tolist()]
    assert beginning_of_text(tmp_path / "out" / "tokenizer.json") == (ByteTokenizer.eot,)
    assert tokenizer.eos_token_id == ByteTokenizer.eot
    assert load_tokenizer(tmp_path / "out" / "tokenizer.json").eot == ByteTokenizer.eot
    other = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert other.generation_config.eos_token_id == ByteTokenizer.eot
    tokens = torch.randint(0, 256, (1, 9))
    run = gatewright.load(tiny_run)
    with torch.no_grad():
        parity.near(run(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("family", theirs.CLASSES)
def test_settings_come_back_from_the_configuration_that_is_written(family: str):
    from gatewright.conversion.configurations import describe

    for seed in range(6):
        settings = parity.random_settings(family, random.Random(seed))
        model = get_paper(family).build(settings)
        config = released_config(family, settings, model)
        found = describe(config)
        # Widths of layers that do not exist and training's own settings are not in it.
        lost = {"moe_layers", "ffn_width", "balance_weight", "z_weight", "device_weight", "bias_rate"}
        lost |= {"communication_weight", "future_weight"}
        for name, value in vars(settings).items():
            if name == "rope_scaling":
                assert found.rope_scaling == str(type(model.rotary.scaling).parse(value))
            elif name not in lost:
                assert getattr(found.settings, name) == value, name
        assert found.eps == model.norm.eps
        built = get_paper(family).build(found.settings)
        assert {n: v.shape for n, v in built.state_dict().items()} == {
            n: v.shape for n, v in model.state_dict().items()
        }


REFUSED = [
    ("switch", {}, "a run of switch cannot be exported"),
    ("mixtral", {"expert_width": (8, 16)}, "one size for all layers"),
    ("olmoe", {"moe_layers": "every:2"}, "released ones have sparse layers only"),
    ("olmoe", {"head_dim": 16}, "olmoe has width / num_heads, 32"),
    ("deepseek_v3", {"num_shared_experts": 0}, "deepseek_v3 has at least one"),
    ("deepseek_v2", {"moe_layers": "every:2"}, "dense layers at the begin only"),
    ("llama4", {"temperature": (2.5, 0.1)}, "whole numbers of tokens"),
]


@pytest.mark.parametrize(("paper", "changes", "reason"), REFUSED)
def test_what_no_released_architecture_is_is_refused(paper: str, changes: dict[str, Any], reason: str):
    settings = replace(get_paper(paper).Settings(), **changes)
    model = get_paper(paper).build(settings)
    with pytest.raises(UserError, match=reason):
        released_config(paper, settings, model)


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    random_model("olmoe", vocab_size=20_000).save_pretrained(tmp_path / "in")
    options, real, written = ConvertRun(shard_mb=1), shards.write_shard, []

    def stop(path: Path, *rest: Any) -> None:
        if written:
            raise KeyboardInterrupt
        real(path, *rest)
        written.append(path)

    monkeypatch.setattr("gatewright.experiments.convert.write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()
    before = written[0].stat().st_mtime_ns
    monkeypatch.setattr("gatewright.experiments.convert.write_shard", real)
    found = convert(tmp_path / "in", tmp_path / "out", options)
    assert found.files > 1
    assert (tmp_path / "out" / written[0].name).stat().st_mtime_ns == before
    assert not (tmp_path / "out.partial").exists()
    same(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="out exists; allowed: a new folder"):
        convert(tmp_path / "in", tmp_path / "out")


def test_verify_sees_one_bit(tmp_path: Path):
    random_model("olmoe").save_pretrained(tmp_path)
    tensors, entries = load_file(tmp_path / "model.safetensors"), _entries(tmp_path)

    def get(entry: shards.Entry) -> Tensor:
        return tensors[entry.name]

    assert check_bits(tmp_path, entries, get) == len(tensors)
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
    with pytest.raises(RunFailure, match=r"model\.norm\.weight.*differs"):
        check_bits(tmp_path, entries, get)


def test_verify_sees_weights_that_are_no_numbers(tmp_path: Path):
    model = random_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3] = torch.nan
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(RunFailure, match=r"layer 1 in .* holds NaN"):
        convert(tmp_path / "in", tmp_path / "out", VERIFIED)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    random_model("mixtral").save_pretrained(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--verify", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "mixtral"
    assert told["verified"] is True
    assert main(["convert", str(tmp_path / "in")]) == 2
    assert "DST is missing" in capsys.readouterr().err
