"""The plan of a model: exact parameters, hand-worked bytes, activations against what autograd keeps."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.backbones import RMSNorm
from gatewright.errors import UserError
from gatewright.evaluation import memory
from gatewright.evaluation.memory import training_memory
from gatewright.evaluation.plan import plan
from gatewright.kernels import native
from gatewright.papers import get_paper, published_names


def test_mixtral_8x7b_is_exact():
    result = plan("mixtral-8x7b").to_dict()
    assert result["total_parameters"] == 46_702_792_704
    assert result["active_parameters"] == 12_879_925_248
    rounded = {kind: round(size, 1) for kind, size in result["weights_gb"].items()}
    assert rounded == {"fp32": 186.8, "bf16": 93.4, "int8": 46.7, "int4": 23.4}
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(plan("mixtral-8x7b").to_dict()))


def test_mixtral_8x7b_by_hand():
    result = plan("mixtral-8x7b", dtype="bf16", context=1000, batch=3)
    # 2 (keys, values) x 32 layers x 8 heads x 128 numbers x 2 bytes = 131,072 bytes per token.
    assert result.kv_cache_gb == pytest.approx(131_072 * 3000 / 1e9)
    assert result.inference_gb == pytest.approx(result.weights_gb["bf16"] + result.kv_cache_gb)
    # Two SwiGLU experts of 3 matrices 4096 x 14336, 32 layers, 2 FLOPs per weight.
    assert result.flops_by_part["experts"] == 2 * 32 * 2 * 3 * 4096 * 14336
    # Scores and weighted sum: 2 x 2 FLOPs x 32 heads x 128 numbers x 500.5 keys on average, 32 layers.
    assert result.flops_by_part["attention_scores"] == 2 * 2 * 4096 * 500.5 * 32
    assert result.train_flops_per_token == 3 * result.forward_flops_per_token
    share = (result.flops_by_part["attention_scores"] + 2 * 32 * 41_943_040) / sum(
        result.flops_by_part.values()
    )
    assert result.attention_share == pytest.approx(share)
    assert result.training_gb is not None
    # bf16 weight and gradient, fp32 master copy and two fp32 moments.
    assert result.training_gb["weights"] == result.training_gb["gradients"] == result.weights_gb["bf16"]
    assert result.training_gb["optimizer"] == pytest.approx(12 * 46_702_792_704 / 1e9)


def test_olmoe_is_within_half_a_percent():
    result = plan("olmoe-1b-7b")
    assert result.total_parameters == pytest.approx(6.92e9, rel=0.005)
    assert result.active_parameters == pytest.approx(1.28e9, rel=0.005)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd_momentum", "sgd"])
def test_training_bytes_per_parameter(optimizer: str):
    states = {"adamw": 8, "sgd_momentum": 4, "sgd": 0}
    for dtype, rest in (("fp32", 4 + 4), ("bf16", 2 + 2 + 4)):
        result = plan("olmoe", dtype=dtype, optimizer=optimizer)
        assert result.training_gb is not None
        fixed = sum(result.training_gb[part] for part in ("weights", "gradients", "optimizer"))
        assert fixed * 1e9 == pytest.approx((rest + states[optimizer]) * result.total_parameters)


def test_devices_by_hand():
    # 93.4 GB of weights and 4.3 GB of cache in 0.9 x 80 GB: two; in 0.9 x 141: one.
    result = plan("mixtral-8x7b", device_memory_gb=80)
    assert [d["inference"] for d in result.devices] == [2]
    assert plan("mixtral-8x7b", device_memory_gb=141).devices[0]["inference"] == 1
    assert result.training_gb is not None
    assert result.devices[0]["training"] == -(-result.training_gb["total"] // 72)
    assert plan("mixtral-8x7b", dtype="int8", device_memory_gb=80).devices[0]["training"] is None


def test_int8_cache_stays_in_bf16():
    assert plan("mixtral", dtype="int8").kv_cache_gb == plan("mixtral", dtype="bf16").kv_cache_gb
    assert plan("mixtral", dtype="fp32").kv_cache_gb == 2 * plan("mixtral", dtype="bf16").kv_cache_gb
    assert plan("mixtral", dtype="int4").training_gb is None


def test_a_plan_takes_no_memory_and_little_time():
    start = time.process_time()
    for name in published_names():
        plan(name)
    # Weights of these add up to more than a terabyte; allocated, no machine would pass.
    assert time.process_time() - start < 0.5 * len(published_names())


def kept_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # a freed address must not be counted for its successor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(forward())
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("paper", "changes"),
    [
        ("mixtral", {}),
        ("mixtral", {"moe_layers": "none"}),
        ("mixtral", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_experts": 8}),
        ("olmoe", {"moe_layers": "first_dense:1"}),
        ("switch", {"capacity_factor": None, "activation": "relu"}),
        ("switch", {"moe_layers": "none", "activation": "gelu"}),
        ("switch", {"moe_layers": "none", "dropout": 0.1}),
        ("switch", {"capacity_factor": None, "dropout": 0.1, "expert_dropout": 0.4}),
        ("sparsely_gated", {}),
        ("sparsely_gated", {"moe_layers": "none", "ffn_width": 96, "ffn_depth": 3, "dropout": 0.0}),
        ("sparsely_gated", {"lstm_width": 96}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {"latent": (24, 16, 16, 8, 12)}),
        ("gpt_oss", {"window": 32}),
        ("qwen2_moe", {}),
    ],
)
@pytest.mark.parametrize("form", [None, "matmul"])
def test_activations_match_what_autograd_keeps(
    monkeypatch: pytest.MonkeyPatch, paper: str, changes: dict[str, Any], dtype: str, form: str | None
):
    if form:
        monkeypatch.setenv("GATEWRIGHT_ATTENTION", form)
    file = get_paper(paper)
    settings = dataclasses.replace(file.Settings(), num_layers=3, vocab_size=100, **changes)
    model = file.build(settings).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    tokens = torch.randint(0, 100, (2, 129))

    def forward() -> Tensor:
        loss: Tensor = file.objective(settings)(model(tokens[:, :-1]), tokens[:, 1:]).total
        return loss

    measured = kept_bytes(forward, list(model.parameters()))
    formula = training_memory(model, dtype, context=128, batch=2, optimizer="adamw").activations
    # The formula also counts what no hook sees at the loss: the logits' gradient, and where torch computes it
    # the logits as they came.
    each = 4 if dtype == "fp32" else 2
    unseen = 256 * 100 * (each if native.is_ready() else each + 4)
    assert formula - unseen == pytest.approx(measured, rel=0.03)


@pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
def test_norms_keep_a_root_for_each_row():
    norm = RMSNorm(8)
    x = torch.randn(1000, 3, 8, requires_grad=True)  # three heads of 1000 tokens
    measured = kept_bytes(lambda: norm(x), list(norm.parameters()))
    assert measured == 1000 * memory._norm_bytes(24, 4.0, output_kept=False, norms=3)


def test_recomputing_keeps_one_block_and_the_inputs():
    small = plan("mixtral", dtype="fp32").training_gb
    assert small is not None
    deep = plan(settings=get_paper("mixtral").Settings(num_layers=20), dtype="fp32").training_gb
    assert deep is not None
    # 18 further layers: only their inputs, 4 bytes x width 64 x context 256.
    grown = deep["activations_recomputed"] - small["activations_recomputed"]
    assert grown * 1e9 == pytest.approx(18 * 4 * 64 * 256)
    assert deep["activations"] > 5 * deep["activations_recomputed"]


def test_a_plan_with_recomputed_blocks_totals_what_they_keep():
    kept, again = plan("olmoe-1b-7b", batch=64), plan("olmoe-1b-7b", batch=64, recompute="blocks")
    assert kept.training_gb is not None
    assert again.training_gb is not None
    saved = kept.training_gb["activations"] - kept.training_gb["activations_recomputed"]
    assert kept.training_gb["total"] - again.training_gb["total"] == pytest.approx(saved)
    assert again.devices[0]["training"] < kept.devices[0]["training"]  # type: ignore[operator]
    assert "if recomputed" in kept.to_text()
    assert "if kept" in again.to_text()
    with pytest.raises(UserError, match=r"recompute 'all' is unknown; allowed: none, blocks"):
        plan("mixtral", recompute="all")


def test_names_and_settings_lead_to_the_same_plan():
    from_id = plan("olmoe")
    from_settings = plan(settings=get_paper("olmoe").Settings())
    from_paper = plan(paper="olmoe")
    assert from_id.total_parameters == from_settings.total_parameters == from_paper.total_parameters
    assert from_id.paper == from_settings.paper == "olmoe"


def test_a_run_folder(tmp_path: Path):
    (tmp_path / "run.toml").write_text(
        '[run]\npaper = "mixtral"\nseed = 3\n[model]\nnum_layers = 3\nnum_experts = [4, 8, 16]\n'
    )
    expected = plan(settings=get_paper("mixtral").Settings(num_layers=3, num_experts=(4, 8, 16)))
    for name in (tmp_path, tmp_path / "run.toml"):
        assert plan(str(name)).total_parameters == expected.total_parameters
    (tmp_path / "run.toml").write_text('[run]\npaper = "olmoe"\n')
    assert plan(str(tmp_path)).total_parameters == plan("olmoe").total_parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nnum_expert = 4\n", "num_experts"),
        ("model = 3\n", "is no table"),
        ("[model\n", "cannot be read as TOML"),
        ('[run]\npaper = "glam"\n', "planned"),
    ],
)
def test_a_wrong_run_file_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        plan(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mixtral-8x7"}, "did you mean 'mixtral-8x7b'"),
        ({"name": "mixtrel"}, "did you mean 'mixtral'"),
        ({"name": "glam"}, "planned"),
        ({"name": None}, "no model given"),
        ({"name": "no/such/folder.toml"}, "is not there"),
        ({"name": "olmoe", "dtype": "fp8"}, "dtype 'fp8' is unknown"),
        ({"name": "olmoe", "optimizer": "adam"}, "did you mean 'adamw'"),
        ({"name": "olmoe", "context": 0}, "context 0"),
        ({"name": "olmoe", "batch": 0}, "batch 0"),
        ({"name": "olmoe", "device_memory_gb": 0.0}, "device_memory_gb 0.0"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        plan(**arguments)
    assert "\n" not in str(caught.value)


def test_settings_of_another_paper_are_refused():
    with pytest.raises(UserError, match="not those of paper"):
        plan(settings=get_paper("olmoe").Settings(), paper="mixtral")


def test_text_says_what_the_numbers_say():
    text = plan("mixtral-8x7b").to_text()
    for part in (
        "46,702,792,704",
        "12,879,925,248",
        "fp32 186.8 GB",
        "bf16 93.4 GB",
        "int8 46.7 GB",
        "1e9 bytes",
    ):
        assert part in text
    assert "int8 0.861 MB" in plan("olmoe").to_text()
