"""Outrageously Large Neural Networks: The Sparsely-Gated MoE Layer (Shazeer et al., arXiv 1701.06538, 2017).

Between two LSTMs stands a mixture that sees all time steps at once; each token uses K of up to thousands of
experts. Learned noise lets experts near the threshold be tried, two losses keep all in use, and gates start
at 0. The mixture's output passes a sigmoid; every layer has dropout and a residual connection.

Equations: 3-5, G(x) = softmax(KeepTopK(x W_g + n softplus(x W_noise), K)); 6-7, w CV(Importance)^2; 8-11,
w CV(Load)^2; 12-14, two levels of gates; 16-20, strictly balanced gating with learned thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from gatewright.backbones import (
    LSTMDecoder,
    dense_layer,
    gated_router,
    initialise,
    moe_pattern,
    per_layer,
)
from gatewright.objectives import NextToken, check_weights
from gatewright.parts import MoELayer


@dataclass(frozen=True)
class Settings:
    """A small CPU default: embedding, LSTM, mixture, LSTM; the rows of tables 7 and 8 are in PUBLISHED."""

    vocab_size: int = 257
    """V, ids of the tokenizer"""
    width: int = 64
    """D, width of the residual stream, and cells of an LSTM"""
    num_layers: int = 2
    """L, LSTM layers"""
    lstm_width: int = 0
    """cells of an LSTM whose output is projected to the width; 0 is as many as the width, not projected"""
    num_experts: int | tuple[int, ...] = 64
    """E, experts per mixture; one value, or one per LSTM"""
    num_selected: int | tuple[int, ...] = 4
    """K, experts per token; one value, or one per LSTM; two levels of gates choose sqrt(K) each"""
    expert_width: int | tuple[int, ...] = 128
    """F, ReLU units of an expert; one value, or one per LSTM"""
    moe_layers: str = "first_dense:1"
    """which LSTMs have a mixture before them: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 0
    """ReLU units of a dense layer before the other LSTMs; 0 is no layer"""
    ffn_depth: int = 1
    """hidden layers of such a dense layer"""
    gate: str = "flat"
    """flat (noisy top-K), groups:A (hierarchical, A groups), or balanced (batchwise, thresholds learned)"""
    dropout: float = 0.1
    """share of each layer's output that training sets to 0"""
    context: int = 128
    """longest sequence, in tokens"""
    importance_weight: float = 0.1
    """w_importance; of the balanced gate, the weight of the loss that teaches its thresholds"""
    load_weight: float = 0.1
    """w_load"""


_LM = Settings(793_471, 512, expert_width=1024, num_experts=32)
_NONE, _H = replace(_LM, moe_layers="none"), replace(_LM, gate="groups:16")
_NEWS = ((256, 32), (1024, 32), (4096, 64), (16384, 128), (65536, 256), (131072, 256))
_ROWS = {
    # Table 7 without 5-grams; torch's LSTM cannot project 512 cells to 512.
    **{f"lstm-{c}-512": replace(_NONE, num_layers=1, lstm_width=c) for c in (1024, 2048)},
    "4xlstm-512": replace(_NONE, num_layers=4),
    "moe-1-wide": replace(_NONE, ffn_width=(0, 4096)),
    "moe-1-deep": replace(_NONE, ffn_width=(0, 1024), ffn_depth=4),
    **{f"moe-{n}": replace(_LM, num_experts=n) for n in (4, 32, 256)},
    "moe-256-h": replace(_H, num_experts=256),
    **{f"moe-{n}-h": replace(_H, num_experts=n, dropout=0.2) for n in (1024, 4096)},
    "2xlstm-8192-1024": replace(_NONE, width=1024, lstm_width=8192, dropout=0.25),
    "moe-34m": replace(_H, num_experts=1024, dropout=0.3, width=1024, expert_width=2048),
    "moe-143m": replace(_H, num_experts=256, dropout=0.4, width=1024, lstm_width=4096, expert_width=8192),
    # Table 8, whose 4xLSTM-512 and MoE-32 are those above; the news corpus' vocabulary is not told.
    **{f"news-moe-{n}-h": replace(_LM, num_experts=n, gate=f"groups:{a}") for n, a in _NEWS},
}
PUBLISHED: dict[str, Settings] = {f"sparsely_gated/{name}": row for name, row in _ROWS.items()}


def build(settings: Settings) -> nn.Module:
    """Return the language model that these settings describe, freshly initialised, its gates at 0."""
    s, n = settings, settings.num_layers
    names = ("num_experts", "num_selected", "expert_width", "ffn_width")
    values = zip(*(per_layer(name, getattr(s, name), n) for name in names), strict=True)
    layers = [
        MoELayer(s.width, e, k, f, activation="relu", router=gated_router(s.gate, s.width, e, k))
        if sparse
        else dense_layer(s.width, ffn, s.ffn_depth)
        for sparse, (e, k, f, ffn) in zip(moe_pattern(s.moe_layers, n), values, strict=True)
    ]
    model = LSTMDecoder(s.vocab_size, s.width, layers, s.lstm_width, s.dropout, s.context)
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus each mixture's losses (ours are means over mixtures)."""
    check_weights(settings, "importance_weight", "load_weight")
    s, many = settings, sum(moe_pattern(settings.moe_layers, settings.num_layers))
    if s.gate == "balanced":
        return NextToken(losses={"threshold": many * s.importance_weight})
    return NextToken(losses={"importance": many * s.importance_weight, "load": many * s.load_weight})


DEVIATIONS: tuple[str, ...] = (
    "AdamW with the run's schedule, the full softmax, and initial weights of our own but for the gates'.",
    "The losses take the batch at hand (the paper's: all devices'); texts are windows with an empty state.",
    "Logits of groups that a token does not choose are computed too; `plan` counts them as the paper does.",
    "The paper uses balanced gates in translation alone and gives their loss no weight.",
)
