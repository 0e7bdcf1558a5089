"""Causal grouped-query attention with rotary positions, and the cache it decodes from."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from gatewright.backbones.norm import RMSNorm
from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import apply_linears, attend, native
from gatewright.kernels.native import attention as native_attention

QK_NORMS = ("none", "head", "width")


class RotaryPositions(nn.Module):
    """Rotary position embedding (RoPE) over whole heads, halves rotated against each other (the layout of
    Llama and Mixtral).
    """

    def __init__(self, head_dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise UserError(
                f"head_dim {head_dim}; allowed: even numbers; rotary positions turn pairs of coordinates"
            )
        if head_dim < 2 or not theta > 0:
            raise UserError(f"head_dim {head_dim}, rope_theta {theta}; allowed: 2 or more, and above 0")
        self.head_dim, self.theta = head_dim, theta
        # Not buffers: they are no state, follow no module to another device, and stand in no checkpoint.
        self._known: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def angles(
        self, start: int, length: int, device: torch.device
    ) -> tuple[Float64[Tensor, "S head_dim"], Float64[Tensor, "S head_dim"]]:
        """Return cos and sin, each [length, head_dim] fp64, for positions start .. start + length - 1.

        Equation: angle(p, i) = p * theta ** (-2 i / head_dim), i = 0 .. head_dim / 2 - 1.
        """
        steps = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float64)
        frequency = self.theta ** (-steps / self.head_dim)
        position = torch.arange(start, start + length, device=device, dtype=torch.float64)
        angle = torch.outer(position, frequency).repeat(1, 2)
        return angle.cos(), angle.sin()

    def tables(
        self, start: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "S head_dim"], Float[Tensor, "S head_dim"]]:
        """Return `angles` in `dtype`; computed once for each device and dtype, and again for longer texts."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            cos, sin = self.angles(start, length, device)
            return cos.to(dtype), sin.to(dtype)
        end, key = start + length, (device, dtype)
        if key not in self._known or self._known[key][0].shape[0] < end:
            # Tensors made in inference mode could not enter a later training step.
            with torch.inference_mode(False):
                cos, sin = (one.to(dtype) for one in self.angles(0, 1 << (end - 1).bit_length(), device))
            if type(cos) is not Tensor:  # a tracer's, which must not outlive it
                return cos[start:end], sin[start:end]
            self._known[key] = cos, sin
        cos, sin = self._known[key]
        return cos[start:end], sin[start:end]


def rotate(
    x: Float[Tensor, "B H S head_dim"], cos: Float[Tensor, "S head_dim"], sin: Float[Tensor, "S head_dim"]
) -> Float[Tensor, "B H S head_dim"]:
    """Return x [B, H, S, head_dim] turned by its positions' angles, in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def rotate_pair(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv S head_dim"],
    cos: Float[Tensor, "S head_dim"],
    sin: Float[Tensor, "S head_dim"],
) -> tuple[Float[Tensor, "B H S head_dim"], Float[Tensor, "B Hkv S head_dim"]]:
    """Return q and k as `rotate` turns them; natively in one pass, whose products bf16 does not round."""
    if native.runs_for(q, k, cos):
        return native_attention.rotate_pair(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


class LayerCache:
    """Keys and values of one layer, [B, Hkv, capacity, head_dim], filled from the left."""

    def __init__(
        self, keys: Float[Tensor, "B Hkv capacity head_dim"], values: Float[Tensor, "B Hkv capacity head_dim"]
    ) -> None:
        self.keys, self.values, self.length = keys, values, 0

    def append(
        self, keys: Float[Tensor, "B Hkv S head_dim"], values: Float[Tensor, "B Hkv S head_dim"]
    ) -> tuple[Float[Tensor, "B Hkv P head_dim"], Float[Tensor, "B Hkv P head_dim"]]:
        """Store [B, Hkv, S, head_dim] behind what is there; return everything stored so far."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise UserError(
                f"{end} positions in a cache of {self.keys.shape[2]}; allowed: up to its capacity; make "
                "the cache larger or the text shorter"
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention with H query and Hkv key/value heads, no biases: x [B, S, D] -> [B, S, D].

    `qk_norm`: "none"; "head" (RMSNorm on each head, Qwen3); "width" (RMSNorm over all heads' width before the
    split, OLMoE).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: str = "none",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UserError(
                f"num_heads {num_heads} with num_kv_heads {num_kv_heads}; allowed: key/value heads that "
                "divide the heads"
            )
        if qk_norm not in QK_NORMS:
            raise UserError(
                f"qk_norm {qk_norm!r} is unknown{did_you_mean(qk_norm, QK_NORMS)}; allowed: "
                f"{', '.join(QK_NORMS)}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim, self.qk_norm = (
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm,
        )
        self.query = nn.Linear(width, num_heads * head_dim, bias=False)
        self.key = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, width, bias=False)
        if qk_norm != "none":
            per_head = qk_norm == "head"
            self.query_norm = RMSNorm(head_dim if per_head else num_heads * head_dim, norm_eps)
            self.key_norm = RMSNorm(head_dim if per_head else num_kv_heads * head_dim, norm_eps)

    def _heads(
        self, x: Float[Tensor, "B S _"], num_heads: int, norm: RMSNorm | None
    ) -> Float[Tensor, "B H S head_dim"]:
        if norm is not None and self.qk_norm == "width":
            x = norm(x)
        x = x.unflatten(-1, (num_heads, self.head_dim))
        if norm is not None and self.qk_norm == "head":
            x = norm(x)
        return x.transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        cos: Float[Tensor, "S head_dim"],
        sin: Float[Tensor, "S head_dim"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Return attention over x and, with a cache, over everything before it; the cache is extended."""
        normed = self.qk_norm != "none"
        queries, keys, values = apply_linears(x, (self.query, self.key, self.value))
        q = self._heads(queries, self.num_heads, self.query_norm if normed else None)
        k = self._heads(keys, self.num_kv_heads, self.key_norm if normed else None)
        v = self._heads(values, self.num_kv_heads, None)
        q, k = rotate_pair(q, k, cos, sin)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)
        y = attend(q, k, v, past)
        (out,) = apply_linears(y.transpose(1, 2).flatten(-2), (self.output,))
        return out
