"""Switch Transformers (Fedus, Zoph and Shazeer, arXiv 2101.03961, JMLR 2022) in the form of the paper: T5.

T5's encoder-decoder, in which every other feed-forward layer of both stacks becomes E experts of the dense
layer's shape. Each token goes to the single best one, weighed by its raw router probability; an expert takes
at most C tokens. It learns to write what stood in masked spans of its source. `switch` is the decoder form.

Equations: 1, p(x) = softmax(W_r x); 2, y = p_i(x) E_i(x) with i = argmax p; 3, C = ceil(f T / E);
4-6, loss per layer = alpha E sum_e f_e P_e. Section 2.3: 15 % of the tokens are masked, a sentinel per run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gatewright.backbones import EncoderDecoder, initialise, moe_pattern, per_layer
from gatewright.errors import UserError
from gatewright.objectives import SpanCorruption, Spans
from gatewright.parts import MLP, Capacity, MoELayer

INIT_SCALE, EVAL_FACTOR = 0.1, 2.0


@dataclass(frozen=True)
class Settings:
    """A small CPU default; Table 9 and the released checkpoints are in PUBLISHED."""

    vocab_size: int = 257
    """ids of the tokenizer; the model has one more for each sentinel, and one to begin and end with"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 2
    """L, layers of the encoder, and as many of the decoder"""
    num_heads: int = 2
    """H, attention heads"""
    head_dim: int = 32
    """numbers per head"""
    num_experts: int | tuple[int, ...] = 8
    """E, experts per sparse layer; one value, or one per layer of a stack"""
    expert_width: int | tuple[int, ...] = 256
    """F, hidden width of an expert; one value, or one per layer of a stack"""
    moe_layers: str = "every:2"
    """which layers of a stack are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer of a stack"""
    activation: str = "geglu"
    """of experts and dense layers: relu, gelu, swiglu, geglu"""
    capacity_factor: float | None = 1.25
    """f in training, places per expert over an even share (evaluation: 2.0); none is dropless"""
    context: int = 256
    """tokens of text per window, before spans are masked"""
    tie_embeddings: bool = True
    """one matrix embeds source and target and gives the logits, divided by sqrt(D)"""
    num_sentinels: int = 100
    """most spans that a window may have masked"""
    balance_weight: float = 0.01
    """alpha, weight of each sparse layer's balance loss; the layers' losses are added"""


# 32128 ids in all; 568 tokens become a source of 512 and a target of 114.
_T5 = Settings(32027, 768, 12, 12, 64, 128, 2048, "every:2", 2048, "geglu", 1.25, 568)
_LARGE = replace(_T5, width=1024, num_layers=24, num_heads=16, expert_width=2816, ffn_width=2816)
_XXL = replace(_LARGE, width=4096, num_heads=64, expert_width=10240, ffn_width=10240)
_C = replace(_T5, width=2080, num_layers=15, num_heads=32, num_experts=2048, moe_layers="all")
_C = replace(_C, expert_width=6144, ffn_width=6144, activation="relu", capacity_factor=1.0)
PUBLISHED: dict[str, Settings] = {
    # Table 9. XXL takes the released configuration's 128 experts: the table's 64 cannot give its 395B.
    "switch-base": _T5,
    "switch-large": _LARGE,
    "switch-xxl": _XXL,
    "switch-c": _C,
    # As released: ReLU, a wider dense layer for no gate, 30 heads in Switch-C.
    "switch-base-released": replace(_T5, expert_width=3072, ffn_width=3072, activation="relu"),
    "switch-large-released": replace(_LARGE, expert_width=4096, ffn_width=4096, activation="relu"),
    "switch-c-released": replace(_C, num_heads=30),
}


def _stack(s: Settings) -> list[nn.Module]:
    experts = per_layer("num_experts", s.num_experts, s.num_layers)
    expert_width = per_layer("expert_width", s.expert_width, s.num_layers)
    ffn_width = per_layer("ffn_width", s.ffn_width, s.num_layers)
    places = None if s.capacity_factor is None else Capacity(s.capacity_factor, EVAL_FACTOR)
    common: Any = {"activation": s.activation, "router": "switch", "capacity": places}
    return [
        MoELayer(s.width, experts[i], 1, expert_width[i], **common)
        if sparse
        else MLP(s.width, ffn_width[i], s.activation)
        for i, sparse in enumerate(moe_pattern(s.moe_layers, s.num_layers))
    ]


def build(settings: Settings) -> nn.Module:
    """Return the encoder-decoder that these settings describe, freshly initialised."""
    s, spans = settings, objective(settings).spans
    if spans.num_spans > s.num_sentinels:
        raise UserError(f"num_sentinels {s.num_sentinels}; allowed: {spans.num_spans} or more, one per span")
    own: Any = {"head_dim": s.head_dim, "tie": "all" if s.tie_embeddings else "inputs"}
    own |= {"context": spans.source_length, "target_context": spans.target_length}
    ids = s.vocab_size + s.num_sentinels + 1
    model = EncoderDecoder(ids, s.width, s.num_heads, _stack(s), _stack(s), **own)
    return initialise.fan_in(model, INIT_SCALE, embedding_std=1.0, router_std=0.02)


def objective(settings: Settings) -> SpanCorruption:
    """Return span corruption plus alpha times each sparse layer's balance loss (ours is their mean)."""
    s, num_sparse = settings, 2 * sum(moe_pattern(settings.moe_layers, settings.num_layers))
    spans = Spans(s.context, first_sentinel=s.vocab_size, end=s.vocab_size + s.num_sentinels)
    return SpanCorruption(balance_weight=s.balance_weight * num_sparse, spans=spans)


DEVIATIONS: tuple[str, ...] = (
    "One routing group, the batch at hand; the paper groups tokens per core. AdamW in place of Adafactor.",
    "No dropout, and none in experts (the paper's are for fine-tuning).",
    "Sentinels count upwards from the tokenizer's ids, T5's downwards; one id both begins and ends a text.",
)
