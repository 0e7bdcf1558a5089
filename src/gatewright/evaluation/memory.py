"""Bytes that a decoder needs: weights, optimizer, activations kept for the backward pass, key-value cache.

Counted from the modules, so it works on the meta device. Sizes are in bytes; GB elsewhere means 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gatewright.backbones import Attention, Block, Decoder, EncoderDecoder
from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import choose_attention, native
from gatewright.kernels.dense import fits
from gatewright.parts import MLP, Experts, MoELayer, Router
from gatewright.parts.free_experts import FreeExperts
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.parts.routing import top_k_of
from gatewright.parts.scores import native_name
from gatewright.parts.shared import GatedShared

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
# Bytes of state per parameter beside weight and gradient; two fp32 moments, one, or none.
OPTIMIZERS = {"adamw": 8, "sgd_momentum": 4, "sgd": 0}
MASTER_BYTES = 4
_DTYPE_OF = {4.0: torch.float32, 2.0: torch.bfloat16}
TRAINED_DTYPES = ("fp32", "bf16")


def check_choice(what: str, given: str, allowed: tuple[str, ...]) -> str:
    """Return `given` if it is one of `allowed`; raise UserError otherwise."""
    if given not in allowed:
        raise UserError(
            f"{what} {given!r} is unknown{did_you_mean(given, allowed)}; allowed: {', '.join(allowed)}"
        )
    return given


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step; `recomputed` is what replaces `activations` when blocks are recomputed."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    recomputed: float

    @property
    def total(self) -> float:
        """Sum with all activations kept."""
        return self.total_of(recompute=False)

    def total_of(self, recompute: bool) -> float:
        """Return the sum, with activations kept or recomputed."""
        activations = self.recomputed if recompute else self.activations
        return self.weights + self.gradients + self.optimizer + activations


def training_memory(model: Decoder, dtype: str, context: int, batch: int, optimizer: str) -> TrainingMemory:
    """Return what training takes for `batch` sequences of `context` tokens at a time.

    fp32 keeps weight and gradient in 4 bytes each. bf16 keeps 2 and 2, and the optimizer an fp32 master copy:
    with AdamW both come to 16 bytes per parameter.
    """
    count = sum(p.numel() for p in model.parameters())
    each = BYTES_PER_WEIGHT[check_choice("training dtype", dtype, TRAINED_DTYPES)]
    state = OPTIMIZERS[check_choice("optimizer", optimizer, tuple(OPTIMIZERS))]
    master = MASTER_BYTES if dtype == "bf16" else 0
    tokens = batch * context
    blocks = [_block_bytes(block, each, context, batch) for block in model.layers if isinstance(block, Block)]
    ends = _ends_bytes(model, each)
    kept_inputs = each * model.width * len(blocks)
    return TrainingMemory(
        weights=each * count,
        gradients=each * count,
        optimizer=float((state + master) * count),
        activations=tokens * (sum(blocks) + ends) + _wide_copies(model, each),
        recomputed=tokens * (kept_inputs + max(blocks) + ends),
    )


def _wide_copies(model: Decoder, each: float) -> float:
    """The routers' weights in fp32, in which they multiply, where they are narrower."""
    return 4.0 * sum(router.weight.numel() for router in model.routers().values()) if each < 4 else 0.0


def _norm_bytes(width: int, each: float, output_kept: bool = True, norms: int = 1) -> float:
    """Per token: input and normalised values in fp32, in native passes the input as it came and the root of
    each of `norms`; and the output where the next layer keeps it.
    """
    inner = each * width + 4 * norms if native.is_ready() else 8 * width
    return inner + (each * width if output_kept else 0)


def _block_bytes(block: Block, each: float, context: int, batch: int) -> float:
    """Per token, what one block keeps for its backward pass; `each` bytes per activation.

    Two norms; queries, keys, values, attention's output and its log-sum-exp (fused attention keeps no S x S
    matrix); gated feed-forward: both halves, the activated gate and the product; mixture: the pre-activations
    of K experts, the router's fp32 input and what `_router_bytes` says, and the plan.
    """
    attention = block.attention
    assert isinstance(attention, Attention)
    width = attention.query.weight.shape[1]
    query, key = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    kept = 2 * _norm_bytes(width, each) + each * (2 * query + 2 * key) + 4 * attention.num_heads
    kept += _scores_bytes(attention, each, context, batch)
    if attention.qk_norm != "none":
        per_head = attention.qk_norm == "head"
        for size, heads in ((query, attention.num_heads), (key, attention.num_kv_heads)):
            kept += _norm_bytes(size, each, output_kept=False, norms=heads if per_head else 1)
    return kept + _feed_forward_bytes(block.feed_forward, width, each)


def _scores_bytes(attention: Attention, each: float, context: int, batch: int) -> float:
    """Per token, what attention by plain matmuls keeps beyond a fused one: S weights of each head, the mask
    that all texts share, keys and values once for each head of queries; but no log-sum-exps.
    """
    heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    number = torch.zeros((), dtype=torch.float32 if each == BYTES_PER_WEIGHT["fp32"] else torch.bfloat16)
    q, k = (number.expand(1, count, context, head_dim) for count in (heads, kv_heads))
    if choose_attention(q, k)[0] != "matmul":
        return 0.0
    return each * heads * context + context / batch + each * 2 * (heads - kv_heads) * head_dim - 4 * heads


def _feed_forward_bytes(module: nn.Module, width: int, each: float) -> float:
    if isinstance(module, MoELayer):
        return _mixture_bytes(module, width, each)
    if isinstance(module, GatedShared):
        # The gate's number and the MLP's output, which the product needs.
        return _mlp_bytes(module.mlp, each) + each * (1 + width)
    assert isinstance(module, MLP)
    return _mlp_bytes(module, each)


def _mlp_bytes(mlp: MLP, each: float) -> float:
    hidden, pre = mlp.w_down.shape[1], mlp.w_in.shape[0]
    if native.is_ready() and fits(mlp.w_down.shape[0], hidden, _DTYPE_OF[each]):
        return each * pre
    if mlp.activation == "linear":
        return each * hidden
    if mlp.activation == "clamped_swiglu":
        # Both halves as given and as cut, up + 1, its product with the gate, the sigmoid, and the output.
        return each * (pre + 5 * hidden)
    # ReLU's backward needs its output alone; GELU and the gated forms also keep what went in.
    kept = hidden if mlp.activation == "relu" else pre + hidden + (hidden if pre != hidden else 0)
    return each * kept


def _mixture_bytes(layer: MoELayer, width: int, each: float) -> float:
    router = _router_bytes(layer.router, width, each)
    plan = layer.num_selected * (4 + 8 + 8)  # fp32 weight, slot and token id of each choice
    shared = 0.0 if layer.shared is None else _feed_forward_bytes(layer.shared, width, each)
    return _expert_bytes(layer.experts, width, layer.num_selected, each) + router + plan + shared


def _router_bytes(router: Router, width: int, each: float) -> float:
    """Return what a router keeps: logits and scores in fp32, and its input in fp32 where that is another
    tensor; in native passes the logits, the chosen ids in 32 bits, four numbers, and the input as it came.
    """
    num_experts = router.weight.shape[0]
    top = top_k_of(router.rule)
    if top is None or native_name(router.scores) is None or not native.is_ready():
        return 2 * 4 * num_experts + (4 * width if each < 4 else 0)
    return 4 * (num_experts + top.num_selected + 4)


def _expert_bytes(experts: nn.Module, width: int, num_selected: float, each: float) -> float:
    """Return what K experts keep; among free ones and modules that differ, at an even load.

    Free experts keep x in fp32 where it is narrower. Modules keep their rows, the rows that are combined
    in fp32, and each place's token, slot and mask.
    """
    if isinstance(experts, FreeExperts):
        chosen = num_selected * experts.num_ffn / experts.num_experts
        # A mask and, of constant experts, index, logits, shares, mask and weight of each place; x's factor.
        place = 1 + (8 + 8 + 8 + 1 + 4 if experts.num_constant else 0)
        free = num_selected * place + 4 + (4 * width if each < 4 else 0)
        return _expert_bytes(experts.ffn, width, chosen, each) + free
    if isinstance(experts, ModuleExperts):
        members = [_feed_forward_bytes(member, width, each) for member in experts.members]
        return num_selected * (sum(members) / len(members) + (each + 4) * width + 8 + 8 + 1)
    assert isinstance(experts, Experts)
    dropout = experts.w_down.shape[2] if experts.dropout else 0
    return each * num_selected * (experts.w_in.shape[1] + dropout)


def _ends_bytes(model: Decoder, each: float) -> float:
    """Per token: id, last norm, and at the loss logits and their gradient; in native passes a log-sum-exp,
    else the logits' fp32 copy or gradient and log-probabilities.
    """
    loss = model.vocab_size * 2 * each + 4 if native.is_ready() else model.vocab_size * (each + 4 + 4)
    return 8 + _norm_bytes(model.width, each) + loss


def kv_cache_bytes_per_token(model: Decoder | EncoderDecoder, each: float, context: int = 1) -> float:
    """Return the bytes that one token of one sequence keeps: 2 L Hkv head_dim values of `each` bytes.

    An encoder-decoder keeps those of source and target in each layer of its decoder, here spread over the
    `context` tokens of text that they are made of.
    """
    if isinstance(model, EncoderDecoder):
        own = 2 * len(model.decoder.layers) * model.num_heads * model.head_dim * each
        return own * (model.context + model.target_context) / context
    return 2 * len(model.layers) * model.num_kv_heads * model.head_dim * each
