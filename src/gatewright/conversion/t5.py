"""T5 and Switch Transformers as transformers stores them, read into an EncoderDecoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.backbones import EncoderDecoder
from gatewright.errors import UserError
from gatewright.parts import MLP, Capacity, MoELayer, Router
from gatewright.parts.noise import InputJitter
from gatewright.parts.rules.token_choice import TokenChoice

MODELS = ("t5", "switch_transformers")
# Not gated-gelu: transformers computes it as gelu_new, an approximation that differs in the fourth digit.
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gated-silu": "swiglu"}
# A capacity that is a number of places, whatever the tokens: a factor that gives less, and a minimum.
_NO_SHARE = 1e-9


def load_t5(folder: str | Path) -> EncoderDecoder:
    """Return the model of a folder with config.json and *.safetensors, in evaluation mode.

    Raises: UserError for a folder that holds no such model, and for one of another kind.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; allowed: a folder that save_pretrained wrote")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors; allowed: weights as safetensors; convert them")
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return from_t5(json.loads((folder / "config.json").read_text(encoding="utf-8")), tensors)


def from_t5(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> EncoderDecoder:
    """Return the model of a configuration and a state dict in transformers' names, in evaluation mode.

    An expert takes `expert_capacity` tokens of each sequence, in their order, and a token beyond that adds 0.
    Differs: transformers before its fixes of 2025 and 2026 gave dropped tokens a scaled copy of themselves,
    and version 5 dropped none; and padding takes places there, here none.
    Raises: UserError for a model of another kind, another activation, and for tensors that lack or are left.
    """
    kind = config.get("model_type")
    if kind not in MODELS:
        raise UserError(f"model_type {kind!r}; allowed: {', '.join(MODELS)}")
    activation = config.get("feed_forward_proj" if kind == "t5" else "dense_act_fn", "relu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"activation {activation!r}; allowed: {', '.join(_ACTIVATIONS)}")
    left = dict(tensors)
    # T5 1.1 says that its matrices are not tied; transformers 5 writes that it does not scale instead.
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
    depths = (config["num_layers"], config.get("num_decoder_layers") or config["num_layers"])
    stacks = [
        [_feed_forward(config, left, f"{stack}.block.{i}.layer.{1 + (stack == 'decoder')}") for i in range(n)]
        for stack, n in zip(("encoder", "decoder"), depths, strict=True)
    ]
    model = EncoderDecoder(
        config["vocab_size"],
        config["d_model"],
        config["num_heads"],
        stacks[0],
        stacks[1],
        head_dim=config["d_kv"],
        tie="all" if tied else "inputs",
        num_buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
    )
    with torch.no_grad():
        _fill(model, left)
    if left:
        raise UserError(f"tensor {min(left)} belongs nowhere; allowed: the tensors of a {kind} with a head")
    return model.eval()


def _take(left: dict[str, Tensor], name: str) -> Tensor:
    if name not in left:
        raise UserError(f"tensor {name} is not there; allowed: the whole state dict of a model with a head")
    return left.pop(name)


def _feed_forward(config: Mapping[str, Any], left: dict[str, Tensor], place: str) -> nn.Module:
    """Return a layer's feed-forward module, filled from `left`: a mixture where it has a router."""
    switch = config["model_type"] == "switch_transformers"
    name = f"{place}.{'mlp' if switch else 'DenseReluDense'}"
    activation = _ACTIVATIONS[config.get("dense_act_fn" if switch else "feed_forward_proj", "relu")]
    width, hidden = config["d_model"], config["d_ff"]
    if f"{name}.router.classifier.weight" not in left:
        dense = MLP(width, hidden, activation)
        _copy(dense.w_in, _first(left, name))
        _copy(dense.w_down, _take(left, f"{name}.wo.weight"))
        return dense
    num_experts, eps = config["num_experts"], config.get("router_jitter_noise", 0.0)
    router = Router(
        width,
        num_experts,
        getattr(torch, config.get("router_dtype", "float32")),
        rule=TokenChoice(1, "raw"),
        noise=InputJitter(eps) if eps else None,
        bias=bool(config.get("router_bias", False)),
    )
    layer = MoELayer(
        *(width, num_experts, 1, hidden),
        activation=activation,
        router=router,
        capacity=Capacity(_NO_SHARE, minimum=config["expert_capacity"]),
        group_size="sequence",
    )
    _copy(router.weight, _take(left, f"{name}.router.classifier.weight"))
    if router.bias is not None:
        _copy(router.bias, _take(left, f"{name}.router.classifier.bias"))
    experts: Any = layer.experts
    for e in range(num_experts):
        _copy(experts.w_in[e], _first(left, f"{name}.experts.expert_{e}"))
        _copy(experts.w_down[e], _take(left, f"{name}.experts.expert_{e}.wo.weight"))
    return layer


def _first(left: dict[str, Tensor], name: str) -> Tensor:
    """Return the first matrix, [F, D], or gate and up one above the other, [2F, D]."""
    if f"{name}.wi_0.weight" in left:
        return torch.cat([_take(left, f"{name}.wi_0.weight"), _take(left, f"{name}.wi_1.weight")])
    return _take(left, f"{name}.wi.weight")


def _copy(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise UserError(
            f"a tensor of {list(theirs.shape)} for one of {list(ours.shape)}; allowed: equal sizes"
        )
    with torch.no_grad():
        ours.copy_(theirs)


def _fill(model: EncoderDecoder, left: dict[str, Tensor]) -> None:
    """Copy embeddings, biases, norms and attention; what remains of `left` had no place."""
    shared = _take(left, "shared.weight")
    _copy(model.source_embedding.weight, shared)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        left.pop(name, None)  # the same matrix again
    head = left.pop("lm_head.weight", shared)  # not stored where it is the same matrix
    if model.tie != "all":
        _copy(model.head.weight, head)
    for name, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        first = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        _copy(stack.bias.weight, _take(left, first))
        _copy(stack.norm.weight, _take(left, f"{name}.final_layer_norm.weight"))
        for i, block in enumerate(stack.blocks()):
            place = f"{name}.block.{i}.layer"
            parts = [("0.SelfAttention", block.attention, block.attention_norm)]
            if block.cross is not None and block.cross_norm is not None:
                parts.append(("1.EncDecAttention", block.cross, block.cross_norm))
            for part, attention, norm in parts:
                for theirs, ours in zip("qkvo", ("query", "key", "value", "output"), strict=True):
                    weight = getattr(attention, ours).weight
                    _copy(weight, _take(left, f"{place}.{part}.{theirs}.weight"))
                _copy(norm.weight, _take(left, f"{place}.{part[0]}.layer_norm.weight"))
            _copy(block.feed_forward_norm.weight, _take(left, f"{place}.{len(parts)}.layer_norm.weight"))
