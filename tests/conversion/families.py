"""Every class of experts in transformers that asks for an implementation, made small; five whole models."""

from __future__ import annotations

import importlib
import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.gpt_oss import GptOssConfig, GptOssForCausalLM
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

MODELS = Path(transformers.__file__).parent / "models"
E, D, F, T, K = 5, 8, 12, 14, 3
_DECORATED = re.compile(r"^@use_experts_implementation\b[^\n]*\nclass (\w+)", re.MULTILINE)
_COUNTS = re.compile(r"num_local_experts|n_routed_experts|num_experts")


@cache
def sources() -> dict[str, str]:
    """Return the text of each modeling file by its family."""
    return {
        path.parent.name: path.read_text(encoding="utf-8") for path in sorted(MODELS.glob("*/modeling_*.py"))
    }


def classes() -> list[tuple[str, str]]:
    """Return (family, class of experts) for each class that takes an implementation."""
    return [(family, name) for family, text in sources().items() for name in _DECORATED.findall(text)]


def families_without() -> set[str]:
    """Return the families that count experts, and have no class that takes an implementation."""
    return {
        family for family, text in sources().items() if _COUNTS.search(text) and not _DECORATED.search(text)
    }


def _default_act(module: Any) -> str:
    """Return the activation that the family's text configuration has."""
    for name, config in sorted(vars(module).items()):
        if not name.endswith("Config") or re.search("Vision|Audio|Sam|Code", name):
            continue
        for field in ("hidden_act", "hidden_activation", "mlp_hidden_act"):
            found = getattr(config, field, None)
            if isinstance(found, str):
                return found
    return "silu"


def experts_of(family: str, name: str, dtype: torch.dtype = torch.float32, **other: Any) -> nn.Module:
    """Return a small module of the class with random weights; its own forward is the eager one."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    act = _default_act(module)
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E)
    acts = dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), act)
    fields: dict[str, Any] = {
        **counts, **acts, "hidden_size": D, "moe_hidden_size": D, "intermediate_size": F,
        "moe_intermediate_size": F, "moe_latent_size": None, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
        "mlp_gate_softcap": 3.0, "mlp_up_softcap": 2.0, "post_norm_eps": 1e-6,
        "_experts_implementation": "eager",
    }  # fmt: skip
    experts = getattr(module, name)(SimpleNamespace(**{**fields, **other}))
    draw = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw).to(dtype)
    built: nn.Module = experts
    return built


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden states, indices, weights); expert 3 gets nothing, the numbers reach beyond the cuts."""
    draw = torch.Generator().manual_seed(4)
    x = (3 * torch.randn(T, D, generator=draw)).to(dtype).requires_grad_()
    index = torch.rand(T, E - 1, generator=draw).argsort(dim=1)[:, :K]
    weights = torch.rand(T, K, generator=draw).to(dtype).requires_grad_()
    return x, torch.where(index == 3, 4, index), weights


def results(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of all that it depends on, by name."""
    y = experts(x, index, weights)
    direction = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    leaves = {name.removeprefix("_orig_mod."): leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), direction)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


_SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OF: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 5}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 5}),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {"n_routed_experts": 6, "moe_intermediate_size": 12, "n_group": 2, "topk_group": 1,
         "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 5, "head_dim": 8}),
}  # fmt: skip
WHOLE = tuple(_OF)


def whole_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of two layers with random weights that matter, computing its experts by itself."""
    model_class, config_class, more = _OF[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**_SMALL, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def token_ids() -> Tensor:
    """Return two sequences of nine tokens."""
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def outcome(model: Any, **more: Any) -> dict[str, Tensor]:
    """Return logits and the gradient of every parameter of the language model's loss, by name."""
    model.zero_grad()
    ids = token_ids().to(model.device)
    found = model(ids, labels=ids, **more)
    found.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), **grads}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference, relative to the largest number of its tensor, and where it is."""
    assert one.keys() == other.keys()
    found = []
    for name, wanted in other.items():
        error = (one[name].double() - wanted.double()).abs().max().item()
        # A NaN is neither larger nor smaller than anything.
        error = error if math.isfinite(error) else math.inf
        found.append((error / max(wanted.abs().max().item(), 1e-30), name))
    return max(found)
