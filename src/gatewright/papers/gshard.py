"""GShard: Scaling Giant Models with Conditional Computation (Lepikhin et al. 2020, arXiv 2006.16668).

Every other feed-forward layer of both stacks is a mixture. A token takes its best expert, and its second by a
coin that favours a large share; C places per expert and group, first choices first; the others pass by.

Equations: 2, FFN_e(x) = wo_e ReLU(wi_e x); 3, y = sum_e G_e FFN_e(x); algorithm 1 as printed: C = 2 S / E,
the second if 2 g2 > u, counters that a rejected choice advances too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gatewright.backbones import EncoderDecoder, initialise, moe_pattern, per_layer
from gatewright.errors import UserError
from gatewright.objectives import SpanCorruption, Spans
from gatewright.parts import MLP, Capacity, MoELayer, build_router


@dataclass(frozen=True)
class Settings:
    """A small CPU default; Table 1's models are in PUBLISHED."""

    vocab_size: int = 257
    """ids of the tokenizer; the model has one more for each sentinel, and one to begin and end with"""
    source_vocab_size: int | None = None
    """ids of the source where it has a tokenizer of its own; none: both texts have the same"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 2
    """L, layers of the encoder, and as many of the decoder (the paper's L counts both)"""
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
    capacity_factor: float = 1.0
    """f, places per expert over an even share of both choices: 1 is the paper's 2 S / E"""
    group_size: int | None = None
    """S, tokens per routing group; none is all of a micro-batch"""
    context: int = 256
    """tokens of text per window, before spans are masked"""
    num_sentinels: int = 100
    """most spans that a window may have masked"""
    balance_weight: float = 0.01
    """k, weight of l_aux times E squared (1 when balanced, mean over layers)"""
    dropout: float = 0.0
    """share of the embedded texts and of what each part of a layer adds that training sets to 0"""


# Appendix A.2; 64k source and 32k target ids. Groups and lengths are ours: the paper gives none.
_M4 = Settings(32000, 64000, 1024, 18, 16, 128, 2048, 8192, "every:2", 8192, 1.0, 4096, 1024, dropout=0.1)
PUBLISHED: dict[str, Settings] = {
    # Tables 1 and 3; the paper's layers are those of both stacks.
    "gshard-600b": _M4,
    "gshard-200b": replace(_M4, num_layers=6),
    "gshard-150b": replace(_M4, num_experts=512),
    "gshard-50b": replace(_M4, num_experts=512, num_layers=6),
    "gshard-37b": replace(_M4, num_experts=128),
    "gshard-12b": replace(_M4, num_experts=128, num_layers=6),
}
# Table 1: cores and days of training.
TRAINED_ON: dict[str, tuple[int, float]] = {
    **{"gshard-600b": (2048, 4.0), "gshard-200b": (2048, 1.4), "gshard-150b": (512, 11.0)},
    **{"gshard-50b": (512, 3.5), "gshard-37b": (128, 17.3), "gshard-12b": (128, 5.4)},
}


def core_years(name: str) -> float:
    """Return the TPU core-years that a size of table 1 was trained for: cores x days / 365.25."""
    return TRAINED_ON[name][0] * TRAINED_ON[name][1] / 365.25


def _stack(s: Settings) -> list[nn.Module]:
    names = ("num_experts", "expert_width", "ffn_width")
    sizes = [per_layer(name, getattr(s, name), s.num_layers) for name in names]
    layers: list[nn.Module] = []
    for sparse, e, f, ffn in zip(moe_pattern(s.moe_layers, s.num_layers), *sizes, strict=True):
        router = build_router("gshard", s.width, e, 2, counters="literal") if sparse else None
        places = Capacity(s.capacity_factor, order="rank")
        more: Any = {"activation": "relu", "group_size": s.group_size, "router": router, "capacity": places}
        layers.append(MoELayer(s.width, e, 2, f, **more) if sparse else MLP(s.width, ffn, "relu"))
    return layers


def build(settings: Settings) -> nn.Module:
    """Return the encoder-decoder that these settings describe, freshly initialised."""
    s, spans, extra = settings, objective(settings).spans, settings.num_sentinels + 1
    if spans.num_spans > s.num_sentinels:
        raise UserError(f"num_sentinels {s.num_sentinels}; allowed: {spans.num_spans} or more, one per span")
    source = s.source_vocab_size and s.source_vocab_size + extra
    own: Any = {"head_dim": s.head_dim, "attention_scale": s.head_dim**-0.5, "source_vocab_size": source}
    own |= {"context": spans.source_length, "target_context": spans.target_length, "dropout": s.dropout}
    own |= {"tie": "none" if source else "inputs"}
    model = EncoderDecoder(s.vocab_size + extra, s.width, s.num_heads, _stack(s), _stack(s), **own)
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> SpanCorruption:
    """Return the task plus k times E^2 l_aux (algorithm 1's l_aux is 1 / E^2 when balanced)."""
    spans = Spans(settings.context, settings.vocab_size, settings.vocab_size + settings.num_sentinels)
    return SpanCorruption(losses={"gshard": settings.balance_weight}, spans=spans)


DEVIATIONS: tuple[str, ...] = (
    "`train` has it fill masked spans of any text, `pairs` translate; the paper translates 100 languages.",
    "T5's relative positions and norms before each layer (ours): the paper does not say what it has.",
    "In evaluation every second choice is used and no coin flipped; algorithm 1 makes no difference.",
    "k of l_aux is not in the paper: 0.01 of E^2 l_aux is ours. AdamW; no dropout of attention weights.",
)
