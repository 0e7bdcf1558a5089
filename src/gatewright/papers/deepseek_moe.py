"""DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066, ACL 2024).

Experts are cut into m times as many narrow ones, of which m times as many are active; K_s of them are shared:
every token passes them, with weight 1. The routed ones are weighed by their raw softmax score. The first
layer stays dense, and two losses keep experts, and devices that hold groups of them, evenly used.

Equations: 9-11, h_t = u_t + sum over shared FFN_i(u_t) + sum over the K best routed s_i,t FFN_i(u_t), s_i,t =
softmax_i(u_t . e_i); 12-14, alpha_1 sum_i f_i P_i with f_i = N' / (K' T) x tokens that select i; 15-17,
alpha_2 sum_d f'_d P'_d over devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import Decoder, feed_forwards, initialise, moe_pattern, per_layer
from gatewright.errors import UserError
from gatewright.objectives import NextToken, check_weights
from gatewright.parts import MoELayer


@dataclass(frozen=True)
class Settings:
    """A small CPU default with the paper's two shared experts; its own size is in PUBLISHED."""

    vocab_size: int = 257
    """V, ids of the tokenizer"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 3
    """L, decoder layers"""
    num_heads: int = 2
    """H, attention heads"""
    head_dim: int = 32
    """numbers per head"""
    num_experts: int | tuple[int, ...] = 64
    """N', routed experts per sparse layer; one value, or one per layer"""
    num_selected: int | tuple[int, ...] = 6
    """K', routed experts per token; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 32
    """F, hidden width of an expert; one value, or one per layer"""
    num_shared_experts: int = 2
    """K_s, experts that every token passes; 0 is none"""
    moe_layers: str = "first_dense:1"
    """which layers are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer"""
    context: int = 256
    """longest sequence, in tokens"""
    balance_weight: float = 0.001
    """alpha_1, weight of each sparse layer's expert balance loss; the layers' losses are added"""
    device_weight: float = 0.0
    """alpha_2, weight of each sparse layer's device balance loss, added alike"""
    num_devices: int = 1
    """D, devices that hold the experts in equal groups; looked at by the device loss alone"""


PUBLISHED: dict[str, Settings] = {
    # Section 5.1.2; widths of experts and of the first layer, and the vocabulary, from its configuration.
    "deepseek-moe-16b": Settings(
        102400, 2048, 28, 16, 128, 64, 6, 1408, 2, "first_dense:1", 10944, 4096, 0.001
    ),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s = settings

    def sparse(num_experts: int, num_selected: int, expert_width: int) -> MoELayer:
        shared = s.num_shared_experts
        sizes = (s.width, num_experts, num_selected, expert_width)
        return MoELayer(*sizes, router="deepseek_moe", num_shared_experts=shared)

    layers = feed_forwards(s, sparse)
    model = Decoder(
        s.vocab_size, s.width, s.num_heads, layers, head_dim=s.head_dim, context=s.context, norm_eps=1e-6
    )
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus each sparse layer's losses (ours are their means)."""
    s = settings
    check_weights(s, "device_weight")
    for experts in per_layer("num_experts", s.num_experts, s.num_layers):
        if s.num_devices < 1 or experts % s.num_devices:
            raise UserError(f"num_devices {s.num_devices} for {experts} experts; allowed: divisors of them")
    num_sparse = sum(moe_pattern(s.moe_layers, s.num_layers))
    further = {f"device:{s.num_devices}": s.device_weight * num_sparse} if s.device_weight else {}
    return NextToken(balance_weight=s.balance_weight * num_sparse, losses=further)


DEVIATIONS: tuple[str, ...] = (
    "The paper draws all weights with std 0.006, at its width; here fan-in (std fan_in ** -0.5), which small "
    "widths train with.",
    "No sizes of the 2B validation model: its experts' exact width was not found.",
)
