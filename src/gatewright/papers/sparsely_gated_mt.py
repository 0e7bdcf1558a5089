"""The translation models of Outrageously Large Neural Networks (Shazeer et al., arXiv 1701.06538, 2017).

GNMT cut down to three LSTMs in the encoder and two in the decoder, with a mixture in each: between the second
and the third, and between the first and the second. The decoder's first LSTM attends to the encoder. One
model translates many pairs: the source begins with a tag that says which language is wanted.

Equations: 22, A(x_i, y_j) = sum_d V_d tanh((x_i U)_d) tanh((y_j W)_d), the attention; 3-11, the noisy gates
and their two losses (several pairs); 16-20, strictly balanced gates (one pair). Appendix E: the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gatewright.backbones import RecurrentEncoderDecoder, dense_layer, gated_router, initialise
from gatewright.errors import UserError
from gatewright.objectives import NextToken, check_weights
from gatewright.parts import MoELayer


@dataclass(frozen=True)
class Settings:
    """A small CPU default; the sizes of appendix E are in PUBLISHED."""

    vocab_size: int = 1024
    """V, ids of the tokenizer; the model has one more for each tag, and one to begin and end with"""
    num_tags: int = 10
    """languages that can be asked for; the tags' ids follow the tokenizer's"""
    width: int = 64
    """D, input and output of every layer"""
    lstm_width: int = 0
    """cells of an LSTM whose output is projected to the width; 0 is as many as the width, not projected"""
    num_experts: int = 32
    """E, experts of each mixture; 0 is a dense layer in its place"""
    num_selected: int = 2
    """K, experts per token; two levels of gates choose sqrt(K) each"""
    expert_width: int = 128
    """F, ReLU units of an expert"""
    ffn_width: int = 0
    """ReLU units of the dense layer where there are no experts; 0 is no layer"""
    gate: str = "flat"
    """flat (noisy top-K), groups:A (hierarchical, A groups), or balanced (batchwise, thresholds learned)"""
    dropout: float = 0.0
    """share of the output of each embedding, LSTM and mixture that training sets to 0"""
    context: int = 40
    """longest source, in tokens, tag and end included"""
    target_context: int = 40
    """longest target, its end included"""
    importance_weight: float = 0.01
    """w_importance; of the balanced gate, the weight of the loss that teaches its thresholds"""
    load_weight: float = 0.01
    """w_load"""


# "32K" pieces are 2^15 here; what several pairs drop out is not told.
_MANY = Settings(2**15, 10, 512, 2048, 512, 2, 8192)
_ONE = replace(_MANY, num_experts=32, num_selected=4, expert_width=2048, gate="balanced", dropout=0.4)
PUBLISHED: dict[str, Settings] = {
    "sparsely_gated_mt/multilingual": _MANY,
    "sparsely_gated_mt/moe-32": _ONE,
    "sparsely_gated_mt/no-moe": replace(_ONE, num_experts=0),
}


def _layer(s: Settings) -> nn.Module | None:
    if s.num_experts < 0:
        raise UserError(f"num_experts {s.num_experts}; allowed: 1 or more, or 0 for a dense layer")
    if s.num_experts == 0:
        return dense_layer(s.width, s.ffn_width)
    e, k = s.num_experts, s.num_selected
    router = gated_router(s.gate, s.width, e, k)
    return MoELayer(s.width, e, k, s.expert_width, activation="relu", router=router)


def build(settings: Settings) -> nn.Module:
    """Return the translation model that these settings describe, freshly initialised, its gates at 0."""
    s, ids = settings, settings.vocab_size + settings.num_tags + 1
    sizes: dict[str, Any] = {
        "lstm_width": s.lstm_width,
        "context": s.context,
        "target_context": s.target_context,
    }
    layers = [_layer(s)], [_layer(s)]
    model = RecurrentEncoderDecoder(ids, s.width, *layers, dropout=s.dropout, **sizes)
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return the loss of the target's tokens plus each mixture's losses (ours are means over mixtures)."""
    check_weights(settings, "importance_weight", "load_weight")
    s, many = settings, 2 if settings.num_experts else 0
    if not many:
        return NextToken()
    if s.gate == "balanced":
        return NextToken(losses={"threshold": many * s.importance_weight})
    return NextToken(losses={"importance": many * s.importance_weight, "load": many * s.load_weight})


DEVIATIONS: tuple[str, ...] = (
    "GNMT's nine encoder layers count its bottom pair, one from either end, as two: so do the three here. "
    "Outputs of the pair are added (GNMT joins them), since every layer's width is the same.",
    "The context of the attention goes to the decoder's first LSTM alone, by that LSTM's last output; so the "
    "printed 85 and 102 million operations come out. The decoder begins with an empty state.",
    "Source and target have one embedding; AdamW with the run's schedule; initial weights of our own.",
    "No hierarchical model of 512 or 2048 experts: strictly balanced gates of two levels are not here.",
)
