"""Bytes that a language model needs: weights, optimizer, activations kept for the backward pass, cache.

Counted from the modules, so it works on the meta device. Sizes are in bytes; GB elsewhere means 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gatewright.backbones import (
    Attention,
    Block,
    DeepMLP,
    EncoderDecoder,
    LanguageModel,
    LatentAttention,
    LSTMDecoder,
    RecurrentBlock,
)
from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import choose_attention, native
from gatewright.kernels.dense import fits
from gatewright.parts import MLP, Experts, MoELayer, Router
from gatewright.parts.free_experts import FreeExperts
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.parts.noise import SoftplusNoise
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


def training_memory(
    model: LanguageModel, dtype: str, context: int, batch: int, optimizer: str
) -> TrainingMemory:
    """Return what training takes for `batch` sequences of `context` tokens at a time.

    fp32 keeps weight and gradient in 4 bytes each. bf16 keeps 2 and 2, and the optimizer an fp32 master copy:
    with AdamW both come to 16 bytes per parameter.
    """
    count = sum(p.numel() for p in model.parameters())
    each = BYTES_PER_WEIGHT[check_choice("training dtype", dtype, TRAINED_DTYPES)]
    state = OPTIMIZERS[check_choice("optimizer", optimizer, tuple(OPTIMIZERS))]
    master = MASTER_BYTES if dtype == "bf16" else 0
    tokens = batch * context
    blocks = [
        _block_bytes(block, each, context, batch)
        if isinstance(block, Block)
        else _recurrent_bytes(block, each)
        for block in model.layers
        if isinstance(block, Block | RecurrentBlock)
    ]
    ends = _ends_bytes(model, each)
    kept_inputs = each * model.width * len(blocks)
    further = sum(
        _future_bytes(model, block, each, context, batch)
        for block in model.future_blocks
        if isinstance(block, Block)
    )
    return TrainingMemory(
        weights=each * count,
        gradients=each * count,
        optimizer=float((state + master) * count),
        activations=tokens * (sum(blocks) + further + ends) + _wide_copies(model, each),
        recomputed=tokens * (kept_inputs + max(blocks) + further + ends),
    )


def _wide_copies(model: LanguageModel, each: float) -> float:
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
    attention, width = block.attention, block.attention_norm.weight.shape[0]
    kept = 2 * _norm_bytes(width, each) + (2 * each * width if block.dropout else 0)
    if isinstance(attention, LatentAttention):
        kept += _latent_bytes(attention, each, context, batch)
    else:
        kept += _attention_bytes(attention, each, context, batch)
    return kept + _feed_forward_bytes(block.feed_forward, width, each)


def _future_bytes(model: LanguageModel, block: Block, each: float, context: int, batch: int) -> float:
    """Per token, what a block that predicts further tokens keeps: itself, what it is made of, its loss."""
    joined = 2 * _norm_bytes(model.width, each, output_kept=False) + each * 2 * model.width
    return _block_bytes(block, each, context, batch) + joined + _ends_bytes(model, each)


def _attention_bytes(attention: Attention, each: float, context: int, batch: int) -> float:
    query, key = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    kept = each * (2 * query + 2 * key) + 4 * attention.num_heads
    kept += _scores_bytes(attention, each, context, batch)
    if attention.qk_norm in ("head", "width"):
        per_head = attention.qk_norm == "head"
        for size, heads in ((query, attention.num_heads), (key, attention.num_kv_heads)):
            kept += _norm_bytes(size, each, output_kept=False, norms=heads if per_head else 1)
    return kept


def _latent_bytes(attention: LatentAttention, each: float, context: int, batch: int) -> float:
    """Per token: queries, keys and values padded to their size, the padded output and the one that is
    multiplied, log-sum-exps; latents as they are normed and as they are multiplied, and the queries' ones.
    """
    sizes, heads = attention.sizes, attention.num_heads
    size = sizes.head_dim + sizes.rotary_dim
    kept = each * heads * (4 * size + sizes.value_dim) + 4 * heads
    by_matmuls = _by_matmuls(heads, heads, size, each, context, batch)
    kept += by_matmuls - each * heads * size if by_matmuls else 0  # which keep no padded output
    kept += _norm_bytes(sizes.kv_rank, each)
    return kept + (_norm_bytes(sizes.query_rank, each) if sizes.query_rank else 0)


def _recurrent_bytes(block: RecurrentBlock, each: float) -> float:
    """Per token, what a recurrent block keeps: the factors of each dropout, a feed-forward layer's input and
    sigmoid, and what the LSTM keeps.
    """
    lstm, feed_forward = block.lstm, block.feed_forward
    dropout = each * lstm.input_size if block.dropout else 0.0
    kept = dropout + _lstm_bytes(lstm, each)
    if feed_forward is not None:
        kept += (
            dropout + each * 2 * lstm.input_size + _feed_forward_bytes(feed_forward, lstm.input_size, each)
        )
    return kept


def _lstm_bytes(lstm: nn.LSTM, each: float) -> float:
    """Per token: input and output, and the workspace of oneDNN, as measured; of a projected LSTM, which torch
    computes itself, for each cell four gates, the cell before and after, and the output before projection.
    """
    width, cells = lstm.input_size, lstm.hidden_size
    if lstm.proj_size:
        return each * (7 * cells + 2 * width)
    return each * 2 * width + cells * (9 * each + 26.25)


def _scores_bytes(attention: Attention, each: float, context: int, batch: int) -> float:
    """Per token, what attention by plain matmuls keeps beyond a fused one: S weights of each head, the mask
    that all texts share, keys and values once for each head of queries; but no log-sum-exps.
    """
    heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    hides = attention.window is not None and attention.window < context
    if hides or attention.sinks is not None:  # a softmax in fp32, and its weights as they are multiplied
        kept = heads * (4 * (context + (attention.sinks is not None)) + (each * context if each < 4 else 0))
        return kept + context / batch + each * 2 * (heads - kv_heads) * head_dim - 4 * heads
    return _by_matmuls(heads, kv_heads, head_dim, each, context, batch)


def _by_matmuls(heads: int, kv_heads: int, head_dim: int, each: float, context: int, batch: int) -> float:
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
    if isinstance(mlp, DeepMLP):
        return each * hidden * (1 + mlp.w_middle.shape[0])
    if native.is_ready() and not mlp.dropout and fits(mlp.w_down.shape[0], hidden, _DTYPE_OF[each]):
        return each * pre
    if mlp.activation == "linear":
        return each * hidden
    if mlp.activation == "clamped_swiglu":
        # Both halves as given and as cut, up + 1, its product with the gate, the sigmoid, and the output.
        return each * (pre + 5 * hidden)
    # ReLU's backward needs its output alone; GELU and the gated forms also keep what went in.
    kept = hidden if mlp.activation == "relu" else pre + hidden + (hidden if pre != hidden else 0)
    return each * (kept + (hidden if mlp.dropout else 0))


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
    # Learned noise: the clean logits, its map, standard deviation and draws.
    noise = 4 * 4 * num_experts if isinstance(router.noise, SoftplusNoise) else 0
    if top is None or native_name(router.scores) is None or not native.is_ready():
        return noise + 2 * 4 * num_experts + (4 * width if each < 4 else 0)
    return noise + 4 * (num_experts + top.num_selected + 4)


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


def _ends_bytes(model: LanguageModel, each: float) -> float:
    """Per token: id, last norm (of an LSTM the head's input and the embedding's dropout), and at the loss
    logits and their gradient; in native passes a log-sum-exp, else the logits' fp32 copy or gradient and
    log-probabilities.
    """
    loss = model.vocab_size * 2 * each + 4 if native.is_ready() else model.vocab_size * (each + 4 + 4)
    last = each * model.width if isinstance(model, LSTMDecoder) else _norm_bytes(model.width, each)
    dropout = each * model.width * (2 - isinstance(model, LSTMDecoder)) if model.dropout else 0.0
    return 8 + last + dropout + loss


def cache_bytes(model: LanguageModel | EncoderDecoder, each: float, context: int) -> float:
    """Return the bytes that generation keeps of one sequence, in values of `each` bytes: for every token in
    each layer 2 Hkv head_dim, or the latent and the rotary key of latent attention; of an LSTM its output and
    cell, however long the text is; of an encoder-decoder source and target in each layer of its decoder.
    """
    if isinstance(model, EncoderDecoder):
        own = 2 * len(model.decoder.layers) * model.num_heads * model.head_dim * each
        return own * (model.context + model.target_context)
    if isinstance(model, LSTMDecoder):
        blocks = [block for block in model.layers if isinstance(block, RecurrentBlock)]
        return each * sum(model.width + block.lstm.hidden_size for block in blocks)
    per_token = sum(block.attention.cached_numbers for block in model.layers if isinstance(block, Block))
    return per_token * each * context
