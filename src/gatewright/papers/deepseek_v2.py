"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434).

DeepSeekMoE with attention over latents: one short vector and one rotary key per token are all that a cache
keeps. A token's experts lie on few devices, the M that hold its best ones, and three losses keep experts,
devices and what they receive even.

Equations: 9-19, latent attention; 20-22, experts, as DeepSeekMoE, times `scale`; section 2.2.2, M devices
first, then the K best experts there; 23-25, alpha_1 sum_i f_i P_i; 26-28, alpha_2 over devices; 29-31,
alpha_3 over what devices receive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gatewright.backbones import feed_forwards, initialise, latent_decoder, moe_pattern
from gatewright.objectives import NextToken, check_weights
from gatewright.parts import MoELayer
from gatewright.parts.rules import build_router


@dataclass(frozen=True)
class Settings:
    """A small CPU default; the published sizes are in PUBLISHED."""

    vocab_size: int = 257
    """V, ids of the tokenizer"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 3
    """L, decoder layers"""
    num_heads: int = 2
    """H, attention heads"""
    latent: tuple[int, int, int, int, int] = (0, 32, 32, 16, 32)
    """ranks of queries (0: none), of keys and values; per head: numbers without position, with, of values"""
    num_experts: int | tuple[int, ...] = 64
    """E, routed experts per sparse layer; one value, or one per layer"""
    num_selected: int | tuple[int, ...] = 6
    """K, routed experts per token; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 32
    """F, hidden width of an expert; one value, or one per layer"""
    num_shared_experts: int = 2
    """experts that every token passes; 0 is none"""
    moe_layers: str = "first_dense:1"
    """which layers are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer"""
    devices: tuple[int, int] = (1, 1)
    """D, devices that hold the experts in equal groups, and M, how many a token's experts may lie on"""
    scale: float = 1.0
    """what the routed experts' output is multiplied with"""
    context: int = 256
    """longest sequence, in tokens"""
    rope_theta: float = 10_000.0
    """base of the rotary positions"""
    rope_scaling: str = "none"
    """stretched positions: none, linear:factor=F, or dynamic, yarn, llama3 with their numbers"""
    balance_weight: float = 0.003
    """alpha_1, weight of each sparse layer's expert balance loss; the layers' losses are added"""
    device_weight: float = 0.05
    """alpha_2, weight of the device balance loss, added alike; no part of it with one device"""
    communication_weight: float = 0.02
    """alpha_3, weight of the communication balance loss, added alike; no part of it with one device"""


_YARN = "yarn:factor=40,original=4096,mscale=0.707,mscale_all_dim=0.707"
PUBLISHED: dict[str, Settings] = {
    # Section 3.1.2 and appendix B; vocabulary, dense widths and YaRN's numbers from the configurations.
    "deepseek-v2": Settings(
        *(102400, 5120, 60, 128, (1536, 512, 128, 64, 128), 160, 6, 1536, 2, "first_dense:1", 12288),
        *((8, 3), 16.0, 163840, 1e4, _YARN),
    ),
    "deepseek-v2-lite": Settings(
        *(102400, 2048, 27, 16, (0, 512, 128, 64, 128), 64, 6, 1408, 2, "first_dense:1", 10944),
        *((1, 1), 1.0, 163840, 1e4, _YARN),
    ),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s, (num_devices, kept) = settings, settings.devices

    def sparse(num_experts: int, num_selected: int, expert_width: int) -> MoELayer:
        options: dict[str, Any] = {"num_groups": num_devices, "groups_kept": kept, "scale": s.scale}
        router = build_router("device_limited", s.width, num_experts, num_selected, **options)
        sizes = (s.width, num_experts, num_selected, expert_width)
        return MoELayer(*sizes, router=router, num_shared_experts=s.num_shared_experts)

    model = latent_decoder(s, feed_forwards(s, sparse))
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus each sparse layer's three losses (ours are their means)."""
    s, (num_devices, kept) = settings, settings.devices
    check_weights(s, "device_weight", "communication_weight")
    num_sparse = sum(moe_pattern(s.moe_layers, s.num_layers))
    further = {
        f"device:{num_devices}": s.device_weight * num_sparse,
        f"communication:{num_devices}:{kept}": s.communication_weight * num_sparse,
    }
    losses = further if num_devices > 1 else {}
    return NextToken(balance_weight=s.balance_weight * num_sparse, losses=losses)


DEVIATIONS: tuple[str, ...] = (
    "The paper draws all weights with std 0.006, at its width; here fan-in (std fan_in ** -0.5), which small "
    "widths train with.",
    "No device drops tokens in training (the paper's capacity of 1.0 per device); nothing is dropped.",
    "The communication loss is as recalled in `communication_loss`: its printed equation was not re-read.",
)
