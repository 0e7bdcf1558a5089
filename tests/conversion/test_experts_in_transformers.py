"""Whole models of transformers with this toolkit's experts: the numbers of their own eager loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatewright.conversion import register_experts, use_in_transformers
from gatewright.errors import UserError
from gatewright.kernels import BACKENDS, runnable_backends

hf = pytest.importorskip("tests.conversion.families", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
each_family = pytest.mark.parametrize("family", hf.WHOLE)


@each_family
def test_logits_and_all_gradients_equal_eager(family: str):
    model = hf.whole_model(family)
    expected = hf.outcome(model)
    assert any(name.endswith("experts.down_proj") for name in expected)
    for backend in (None, *runnable_backends()):
        placed = use_in_transformers(model, backend)
        assert len(placed) == (1 if family == "deepseek_v3" else 2)
        error, name = hf.furthest(hf.outcome(model), expected)
        assert error < 1e-5, f"{backend}: {name}"


@each_family
def test_generation_with_a_cache_gives_the_same_tokens(family: str):
    model = hf.whole_model(family)
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    options["eos_token_id"] = None
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    expected = model.generate(hf.token_ids(), attention_mask=mask, **options)
    assert expected.shape == (2, 21)
    for backend in (None, *runnable_backends()):
        use_in_transformers(model, backend)
        assert torch.equal(model.generate(hf.token_ids(), attention_mask=mask, **options), expected)


@each_family
def test_bf16_is_as_near_to_fp32_as_eager_is(family: str):
    # The toolkit's choice alone: another rounding can turn a router's choice over, see test_families for it.
    exact = hf.outcome(hf.whole_model(family, torch.bfloat16).float())
    model = hf.whole_model(family, torch.bfloat16)
    eager, _ = hf.furthest(hf.outcome(model), exact)
    use_in_transformers(model)
    found = hf.outcome(model)
    assert found["logits"].dtype == torch.bfloat16
    error, name = hf.furthest(found, exact)
    assert error < max(1.5 * eager, 0.05), f"{name}: {error}, eager {eager}"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing_changes_nothing(family: str):
    model = hf.whole_model(family).train()
    expected = hf.outcome(model)
    use_in_transformers(model)
    model.activation_checkpointing_enable()
    assert hf.furthest(hf.outcome(model, use_cache=False), expected)[0] < 1e-5


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_autocast_runs_in_its_dtype(family: str):
    model = hf.whole_model(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected = hf.outcome(model)
        for backend in (None, *runnable_backends()):
            use_in_transformers(model, backend)
            found = hf.outcome(model)
            assert found["logits"].dtype == expected["logits"].dtype
            assert hf.furthest(found, expected)[0] < 0.06, backend


def test_compiled_whole_the_numbers_are_those_of_eager_mode():
    # A program of its own: the shape checks of the test run wrap functions, and cannot be compiled.
    done = subprocess.run(
        [sys.executable, "-m", "tests.conversion.compiled"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "{}"


def test_registering_twice_changes_nothing():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known

    names = register_experts()
    assert names == ("gatewright", *(f"gatewright_{name}" for name in BACKENDS))
    before = {name: known[name] for name in known}
    assert register_experts() == names
    assert {name: known[name] for name in known} == before


def test_transformers_own_switch_is_enough():
    register_experts()
    model = hf.whole_model("olmoe")
    expected = hf.outcome(model)
    model.set_experts_implementation("gatewright_padded")
    assert model.config._experts_implementation == "gatewright_padded"
    assert hf.furthest(hf.outcome(model), expected)[0] < 1e-5
    assert "gatewright" not in str(model.config.to_dict())


def test_importing_the_package_does_not_load_transformers():
    code = "import gatewright, gatewright.conversion, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_backend_that_is_unknown_is_refused_and_the_model_left_as_it_was():
    model = hf.whole_model("mixtral")
    with pytest.raises(UserError, match=r"backend 'gruoped' is unknown; did you mean 'grouped'\?"):
        use_in_transformers(model, "gruoped")
    assert model.config._experts_implementation == "eager"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_family
def test_a_gpu_gives_the_same_numbers(family: str):
    model = hf.whole_model(family)
    expected = hf.outcome(model)
    model.cuda()
    for backend in (None, *runnable_backends()):
        use_in_transformers(model, backend)
        found = {name: value.cpu() for name, value in hf.outcome(model).items()}
        error, name = hf.furthest(found, expected)
        assert error < 1e-4, f"{backend}: {name}"
