"""The routers and losses of transformers as functions of logits, for gatewright.testing.

A router's weight is set to the identity, so that its input is its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.models.axk2 import modeling_axk2 as axk2
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.nllb_moe import modeling_nllb_moe as nllb
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3
from transformers.models.switch_transformers import modeling_switch_transformers as switch

Pair = tuple[Tensor, Tensor]
Router = Callable[..., Pair]


def seeing(module: torch.nn.Module, num_experts: int) -> torch.nn.Module:
    """Return a router whose logits are its input."""
    for name, parameter in module.named_parameters():
        parameter.data = torch.eye(num_experts) if name.endswith("weight") else torch.zeros(num_experts)
    return module


def settings(logits: Tensor, num_selected: int, **more: Any) -> SimpleNamespace:
    """Return the fields of a configuration that routers read."""
    experts = logits.shape[1]
    return SimpleNamespace(
        hidden_size=experts,
        num_experts=experts,
        num_local_experts=experts,
        num_experts_per_tok=num_selected,
        **more,
    )


def top_k(router: type[torch.nn.Module], **more: Any) -> Router:
    """Return a router that gives (logits, weights, experts)."""

    def choose(logits: Tensor, num_selected: int) -> Pair:
        config = settings(logits, num_selected, **more)
        _, weights, experts = seeing(router(config), logits.shape[1])(logits)
        return experts, weights

    return choose


def deepseek(router: type[torch.nn.Module], **more: Any) -> Router:
    """Return a router with groups, a scale and, from V3 on, a bias."""

    def choose(
        logits: Tensor,
        num_selected: int,
        bias: Tensor | None = None,
        num_groups: int = 1,
        groups_kept: int = 1,
        scale: float = 1.0,
    ) -> Pair:
        groups = {"n_group": num_groups, "topk_group": groups_kept, "routed_scaling_factor": scale}
        module = seeing(router(settings(logits, num_selected, **groups, **more)), logits.shape[1])
        if bias is not None:
            module.e_score_correction_bias = bias
        _, weights, experts = module(logits)
        return experts, weights

    return choose


def v4_by_table(logits: Tensor, num_selected: int, table: Tensor, token_ids: Tensor, scale: float) -> Pair:
    """DeepSeek-V4's first layers."""
    config = settings(
        logits,
        num_selected,
        routed_scaling_factor=scale,
        scoring_func="sqrtsoftplus",
        vocab_size=table.shape[0],
    )
    module = seeing(deepseek_v4.DeepseekV4HashRouter(config), logits.shape[1])
    module.tid2eid = table
    _, weights, experts = module(logits, token_ids)
    return experts, weights


def llama(logits: Tensor, num_selected: int) -> Pair:
    """Llama-4 gives scores [T, E], 0 where not chosen, and the logits."""
    module = seeing(llama4.Llama4Router(settings(logits, num_selected)), logits.shape[1])
    scores, _ = module(logits)
    weights, experts = scores.topk(num_selected, dim=1)
    return experts, weights


def switch_router(logits: Tensor, num_selected: int) -> Pair:
    """Switch gives a one-hot choice [B, S, E], the probability [B, S, 1], and the logits."""
    config = settings(
        logits,
        num_selected,
        expert_capacity=logits.shape[0] + 1,
        router_bias=False,
        router_jitter_noise=0.0,
        router_ignore_padding_tokens=False,
        router_dtype="float32",
    )
    module = seeing(switch.SwitchTransformersTop1Router(config), logits.shape[1])
    chosen, weights, _ = module(logits.unsqueeze(0))
    return chosen.squeeze(0).argmax(dim=-1, keepdim=True), weights.squeeze(0)


def nllb_router(before_dropping: bool, policy: str = "random") -> Router:
    """NLLB's top-2 router, its uniform draws replaced by the coins; experts beyond capacity have weight 0."""

    def choose(logits: Tensor, num_selected: int, coins: Tensor, capacity: int | None) -> Pair:
        config = settings(
            logits,
            num_selected,
            expert_capacity=logits.shape[0] * 2 if capacity is None else capacity,
            router_bias=False,
            router_ignore_padding_tokens=False,
            router_dtype="float32",
            second_expert_policy=policy,
            normalize_router_prob_before_dropping=before_dropping,
            batch_prioritized_routing=False,
            moe_eval_capacity_token_fraction=-1.0,
        )
        module = nllb.NllbMoeTop2Router(config)
        with mock.patch.object(torch, "rand_like", return_value=coins):
            _, weights = module.route_tokens(logits, logits.dtype)
        return torch.arange(logits.shape[1]).expand(logits.shape), weights

    return choose


ROUTERS: dict[str, Router] = {
    "mixtral": top_k(mixtral.MixtralTopKRouter),
    "qwen3": top_k(qwen3.Qwen3MoeTopKRouter, norm_topk_prob=True),
    "olmoe": top_k(olmoe.OlmoeTopKRouter, norm_topk_prob=False),
    "gpt_oss": top_k(gpt_oss.GptOssTopKRouter),
    "deepseek_v2": deepseek(deepseek_v2.DeepseekV2TopkRouter, topk_method="group_limited_greedy"),
    "deepseek_v3": deepseek(deepseek_v3.DeepseekV3TopkRouter, norm_topk_prob=True),
    "deepseek_v4": deepseek(deepseek_v4.DeepseekV4TopKRouter, scoring_func="sqrtsoftplus"),
    "deepseek_v4_hash": v4_by_table,
    "llama4": llama,
    "switch": switch_router,
}
AXK2 = deepseek(axk2.AXK2TopkRouter, norm_topk_prob=True)


def balance(logits: Tensor, experts: Tensor, mask: Tensor | None) -> Tensor:
    """Mixtral's load_balancing_loss_func, of logits [L, T, E]; it chooses by itself."""
    found = mixtral.load_balancing_loss_func(tuple(logits), logits.shape[2], experts.shape[2], mask)
    return torch.as_tensor(found)


def switch_balance(logits: Tensor, experts: Tensor, mask: Tensor | None, sequence_length: int) -> Tensor:
    """Switch's load_balancing_loss_func, of sequences [B, S, E]; it knows no mask."""
    batch = logits.softmax(dim=1).view(-1, sequence_length, logits.shape[1])
    return switch.load_balancing_loss_func(batch, experts.view(-1, sequence_length, experts.shape[1]))


def switch_z(logits: Tensor, experts: Tensor, mask: Tensor | None) -> Tensor:
    """Switch's router_z_loss_func; it knows no mask."""
    return switch.router_z_loss_func(logits.unsqueeze(0))


def switch_over_layers(logits: Tensor, experts: Tensor, mask: Tensor | None) -> Tensor:
    """What Switch's model makes of the logits of its layers [L, T, E]."""
    recorded = tuple(layer.unsqueeze(0) for layer in logits)
    model = switch.SwitchTransformersForConditionalGeneration
    joined, chosen = model._unpack_router_logits(None, recorded)
    return switch.load_balancing_loss_func(joined.softmax(dim=-1), chosen)


def recorded_and_true_logits() -> list[tuple[Tensor, Tensor]]:
    """Return, for tiny models that hand out router logits, what they record of a layer and what its router
    computes from what it is given.
    """
    small = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    pairs = []
    for model_class, config_class, more in (
        (olmoe.OlmoeForCausalLM, olmoe.OlmoeConfig, {}),
        (qwen3.Qwen3MoeForCausalLM, qwen3.Qwen3MoeConfig, {"moe_intermediate_size": 8, "head_dim": 8}),
    ):
        torch.manual_seed(0)
        model = model_class(config_class(**small, **more, pad_token_id=0, bos_token_id=1, eos_token_id=2))
        given: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.weight.data.normal_()
            layer.mlp.gate.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        ids = torch.arange(3, 11).unsqueeze(0)
        out = model(ids, output_router_logits=True)
        for layer, x, logits in zip(model.model.layers, given, out.router_logits, strict=True):
            pairs.append((logits, x.reshape(-1, 16) @ layer.mlp.gate.weight.T))
    return pairs
