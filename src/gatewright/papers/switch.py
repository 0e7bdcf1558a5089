"""Switch Transformers (Fedus, Zoph and Shazeer, arXiv 2101.03961, JMLR 2022), as a decoder.

Every other feed-forward layer becomes E experts of the dense layer's shape, and each token goes to the
single best one, weighed by its raw router probability: that probability is what trains the router. An expert
takes at most C tokens; a token beyond that passes by the residual path alone. A balance loss, weights drawn
at a tenth of the usual variance and a router in fp32 keep training steady.

Equations: 1, p(x) = softmax(W_r x); 2, y = p_i(x) E_i(x) with i = argmax p; 3, C = ceil(f T / E);
4-6, loss per layer = alpha E sum_e f_e P_e.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import Decoder, initialise, moe_pattern, per_layer
from gatewright.objectives import NextToken
from gatewright.parts import MLP, MoELayer


@dataclass(frozen=True)
class Settings:
    """A small CPU default; Table 9's dimensions, as decoders, are in PUBLISHED."""

    vocab_size: int = 257
    """V, ids of the tokenizer"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 2
    """L, decoder layers"""
    num_heads: int = 2
    """H, attention heads"""
    head_dim: int = 32
    """numbers per head"""
    num_experts: int | tuple[int, ...] = 8
    """E, experts per sparse layer; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 256
    """F, hidden width of an expert; one value, or one per layer"""
    moe_layers: str = "every:2"
    """which layers are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer"""
    activation: str = "geglu"
    """of experts and dense layers: relu, gelu, swiglu, geglu"""
    capacity_factor: float | None = 1.25
    """f, places per expert over an even share of the tokens; none is dropless"""
    context: int = 256
    """longest sequence, in tokens"""
    tie_embeddings: bool = False
    """use the embedding as output matrix"""
    balance_weight: float = 0.01
    """alpha, weight of each sparse layer's balance loss; the layers' losses are added"""
    init_scale: float = 0.1
    """s, weights are drawn with variance s / fan_in"""
    dropout: float = 0.0
    """in training, of embedding, what layers add, hidden units of dense layers (0.1 in fine-tuning)"""
    expert_dropout: float = 0.0
    """in training, of the experts' hidden units (0.4 in fine-tuning)"""


PUBLISHED: dict[str, Settings] = {
    # Table 9's dimensions, one stack of them: totals are about half of the published encoder-decoders'.
    # XXL takes the released configuration's 128 experts: the table's 64 cannot give its 395B.
    "switch-base-decoder": Settings(32128, 768, 12, 12, 64, 128, 2048, "every:2", 2048, "geglu", 1.25, 512),
    "switch-large-decoder": Settings(32128, 1024, 24, 16, 64, 128, 2816, "every:2", 2816, "geglu", 1.25, 512),
    "switch-xxl-decoder": Settings(32128, 4096, 24, 64, 64, 128, 10240, "every:2", 10240, "geglu", 1.25, 512),
    "switch-c-decoder": Settings(32128, 2080, 15, 32, 64, 2048, 6144, "all", 6144, "relu", 1.25, 512),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s, n = settings, settings.num_layers
    experts = per_layer("num_experts", s.num_experts, n)
    expert_width = per_layer("expert_width", s.expert_width, n)
    ffn_width = per_layer("ffn_width", s.ffn_width, n)
    layers: list[nn.Module] = [
        MoELayer(
            s.width,
            experts[i],
            1,
            expert_width[i],
            activation=s.activation,
            weights="raw",
            capacity_factor=s.capacity_factor,
            expert_dropout=s.expert_dropout,
        )
        if sparse
        else MLP(s.width, ffn_width[i], s.activation, dropout=s.dropout)
        for i, sparse in enumerate(moe_pattern(s.moe_layers, n))
    ]
    model = Decoder(
        s.vocab_size,
        s.width,
        s.num_heads,
        layers,
        head_dim=s.head_dim,
        context=s.context,
        tie_embeddings=s.tie_embeddings,
        dropout=s.dropout,
    )
    return initialise.fan_in(model, scale=s.init_scale, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus alpha times each sparse layer's balance loss (ours is their mean)."""
    num_sparse = sum(moe_pattern(settings.moe_layers, settings.num_layers))
    return NextToken(balance_weight=settings.balance_weight * num_sparse)


DEVIATIONS: tuple[str, ...] = (
    "A decoder trained on next-token prediction; the paper's is T5's encoder-decoder on masked spans.",
    "Rotary positions for T5's relative position bias; embeddings are drawn with std width ** -0.5 (ours).",
    "One routing group, the batch at hand, and one capacity factor; the paper groups tokens per core.",
    "No input jitter of the router, no dropout of attention's probabilities; AdamW in place of Adafactor.",
)
