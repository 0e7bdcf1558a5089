"""Every class of experts that transformers dispatches, one by one; and the families that it does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from gatewright.conversion import NOT_COVERED, experts_forward, register_experts, use_in_transformers
from gatewright.conversion.layouts import activation_of, copies_weights, stacked_weights, their_weights
from gatewright.errors import UserError
from gatewright.kernels import activate, runnable_backends

hf = pytest.importorskip("tests.conversion.families", exc_type=ImportError)

CLASSES = hf.classes()
each_class = pytest.mark.parametrize(("family", "name"), CLASSES, ids=[name for _, name in CLASSES])
# What is not SwiGLU at its family's defaults: ours, or None where the experts compute it themselves.
ACTIVATIONS = {
    "BeamExperts": None,
    "DeepseekV4Experts": None,
    "DiffusionGemmaTextExperts": None,
    "Gemma4TextExperts": None,
    "Glm5NextTextExperts": None,
    "GptOssExperts": "clamped_swiglu",
    "HYV4Experts": None,
    "Inkling2Experts": None,
    "MiniMaxM3VLExperts": "clamped_swiglu",
    "MuseSparkExperts": None,
    "NemotronHExperts": None,
    "OpenAIPrivacyFilterExperts": "clamped_swiglu",
}
# bf16 rounds at other places; the fp32 result of the same bf16 numbers is what both are held to.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def named(experts: nn.Module, backend: str | None) -> nn.Module:
    """Return the experts, computed by this toolkit."""
    experts.config._experts_implementation = "gatewright" if backend is None else f"gatewright_{backend}"
    return experts


def backends_of(name: str) -> list[str | None]:
    """Return the backends that can compute a class."""
    return [None, *runnable_backends()] if ACTIVATIONS.get(name, "swiglu") else [None, "grouped"]


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_eager(family: str, name: str, dtype: torch.dtype):
    register_experts()
    exact = hf.experts_of(family, name, dtype).float()
    x, index, weights = hf.inputs(dtype)
    wide = [t.detach().float().requires_grad_() for t in (x, weights)]
    expected = hf.results(exact, wide[0], index, wide[1])
    assert activation_of(exact) == ACTIVATIONS.get(name, "swiglu")
    assert (expected["down_proj"][3] == 0).all()
    for backend in backends_of(name):
        experts = named(hf.experts_of(family, name, dtype), backend)
        found = hf.results(experts, x, index, weights)
        assert found["y"].dtype == dtype
        error, where = hf.furthest(found, expected)
        assert error < BOUND[dtype], f"{backend}: {where}"


@pytest.mark.parametrize("name", [name for name, ours in ACTIVATIONS.items() if ours])
def test_the_gates_that_ours_stands_for_are_what_they_compute(name: str):
    family = next(of for of, found in CLASSES if found == name)
    experts = hf.experts_of(family, name)
    h = torch.linspace(-20, 20, 6 * 2 * hf.F).view(6, 2 * hf.F)
    mixed = torch.stack(h.chunk(2, dim=-1), dim=-1).flatten(-2) if copies_weights(experts) else h
    torch.testing.assert_close(experts._apply_gate(mixed), activate("clamped_swiglu", h))
    for field, other in (("swiglu_alpha", 1.5), ("swiglu_limit", 6.0)):
        assert activation_of(hf.experts_of(family, name, **{field: other})) is None


@pytest.mark.parametrize("name", [name for name, ours in ACTIVATIONS.items() if not ours])
def test_a_backend_without_their_activation_is_refused_with_the_reason(name: str):
    family = next(of for of, found in CLASSES if found == name)
    experts = named(hf.experts_of(family, name), "padded")
    with pytest.raises(UserError, match=rf"backend 'padded' cannot compute {name}: .* allowed: None or 'gr"):
        experts(*hf.inputs())


@pytest.mark.parametrize(
    ("act", "ours"),
    [
        ("gelu", "geglu"),
        ("gelu_pytorch_tanh", None),
        ("silu", "swiglu"),
        ("relu", None),
        ("quick_gelu", None),
    ],
)
def test_an_activation_is_ours_only_where_the_numbers_are(act: str, ours: str | None):
    register_experts()
    experts = hf.experts_of("mixtral", "MixtralExperts", hidden_act=act)
    expected = hf.results(experts, *hf.inputs())
    assert activation_of(experts) == ours
    assert hf.furthest(hf.results(named(experts, None), *hf.inputs()), expected)[0] < 1e-5


def test_torch_s_gelu_is_ours_only_where_it_is_exact():
    experts = hf.experts_of("mixtral", "MixtralExperts")
    for act, ours in (
        (nn.GELU(), "geglu"),
        (nn.GELU("tanh"), None),
        (nn.functional.gelu, "geglu"),
        (torch.tanh, None),
    ):
        del experts.act_fn
        experts.act_fn = act
        assert activation_of(experts) == ours


@pytest.mark.parametrize(("act", "ours"), [("relu", "relu"), ("gelu", "gelu"), ("silu", None)])
def test_without_a_gate(act: str, ours: str | None):
    register_experts()
    experts = hf.experts_of("nemotron_h", "NemotronHExperts", mlp_hidden_act=act)
    expected = hf.results(experts, *hf.inputs())
    assert activation_of(experts) == ours
    for backend in [None, *runnable_backends()] if ours else [None]:
        assert hf.furthest(hf.results(named(experts, backend), *hf.inputs()), expected)[0] < 1e-5


@each_class
def test_no_weight_is_copied_but_where_gate_and_up_stand_in_turn(family: str, name: str):
    experts = hf.experts_of(family, name)
    assert copies_weights(experts) == (name == "GptOssExperts")
    weights = stacked_weights(experts, their_weights(experts), "swiglu")
    assert weights.w_down.data_ptr() == experts.down_proj.data_ptr()
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    assert (weights.w_in.data_ptr() == first.data_ptr()) != copies_weights(experts)
    assert weights.w_in.shape == (hf.E, hf.F * (2 if experts.has_gate else 1), hf.D)
    assert weights.w_down.shape == (hf.E, hf.D, hf.F)


def test_every_family_is_covered_or_listed_with_its_reason():
    assert {"mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"} <= {family for family, _ in CLASSES}
    # Bamba's file counts experts once, and has none.
    assert hf.families_without() - {"bamba"} == set(NOT_COVERED)
    assert all(len(reason) > 20 for reason in NOT_COVERED.values())


def test_the_page_lists_them_all():
    page = (Path(__file__).resolve().parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    listed = {row[1]: row[0] for row in rows if row[1].startswith("`")}
    own = {family for family, name in CLASSES if name in ACTIVATIONS and not ACTIVATIONS[name]}
    clamped = {family for family, name in CLASSES if ACTIVATIONS.get(name)} - {"gpt_oss"}
    groups = [set(re.findall("`(\\w+)`", families)) for families in listed]
    assert groups == [
        {family for family, _ in CLASSES} - own - clamped - {"gpt_oss"},
        clamped,
        {"gpt_oss"},
        own,
    ]
    assert f"{len(CLASSES)} classes of experts in {len({family for family, _ in CLASSES})} families" in page
    assert {
        row[0].strip("|` "): row[1].rstrip("| ") for row in rows if len(row) == 2 and "`" in row[0]
    } == NOT_COVERED


@pytest.mark.parametrize(
    ("family", "config", "model", "small"),
    [
        (
            "switch_transformers",
            "SwitchTransformersConfig",
            "SwitchTransformersForConditionalGeneration",
            {"num_layers": 2, "num_decoder_layers": 2, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2},
        ),
        ("llama", "LlamaConfig", "LlamaForCausalLM", {"hidden_size": 8, "num_attention_heads": 2}),
    ],
)
def test_a_model_without_such_experts_is_refused(family: str, config: str, model: str, small: dict):
    import transformers

    built = getattr(transformers, model)(
        getattr(transformers, config)(vocab_size=20, num_hidden_layers=1, intermediate_size=8, **small)
    )
    reason = "cannot run on this toolkit's experts .experts are a dictionary"
    reason = reason if family in NOT_COVERED else "has no experts to compute"
    with pytest.raises(UserError, match=f"{model} {reason}"):
        use_in_transformers(built)


def test_quantised_experts_are_refused():
    experts = hf.experts_of("mixtral", "MixtralExperts")
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        UserError, match=r"MixtralExperts holds gate_up_proj as torch\.float8_e4m3fn; allowed"
    ):
        experts_forward(experts, *hf.inputs())
