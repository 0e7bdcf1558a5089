"""Multi-head latent attention: keys and values of all heads from one short vector per token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.backbones.attention import LayerCache, turn_pair
from gatewright.backbones.norm import RMSNorm
from gatewright.errors import UserError
from gatewright.kernels import apply_linears, attend_within


class LatentSizes(NamedTuple):
    """What a latent attention is made of; `query_rank` 0 leaves the queries uncompressed (V2-Lite)."""

    query_rank: int
    """d'_c, numbers that the queries of all heads come from"""
    kv_rank: int
    """d_c, numbers that keys and values of all heads come from"""
    head_dim: int
    """d_h, numbers per head of a query and a key, without position"""
    rotary_dim: int
    """d_R, numbers per head with position; one such key serves all heads"""
    value_dim: int
    """numbers per head of a value"""


class LatentAttention(nn.Module):
    """Causal multi-head latent attention (MLA): x [B, S, D] -> [B, S, D]; a cache keeps d_c + d_R numbers per
    token, 576 at DeepSeek-V2's and V3's size.

    Equation (DeepSeek-V2 eq 9-19, V3 eq 1-11): c = norm(W_DKV x); [k_C; v] = W_UK,UV c for each head; k_R =
    RoPE(W_KR x), one for all heads; q = norm(W_DQ x), [q_C; q_R] = W_UQ,QR q for each head, q_R turned; y =
    W_O of softmax(scale [q_C; q_R] [k_C; k_R]^T) v, scale = score_factor / sqrt(d_h + d_R). Absorbed (V2
    section 2.1.2): q_C k_C^T = (W_UK^T q_C) c^T, and W_UV comes after the sum over keys, so that decoding
    reads c alone: the same numbers, from one key per token for all heads.
    Args: `score_factor` is RopeScaling's. `interleaved` as `turn_pair`: DeepSeek's order. `bias` of W_DQ,
    W_DKV and W_O. `absorbed` None takes the cheaper form, which without a cache is the full one.
    Raises: UserError for sizes below 1 (a query_rank below 0), an odd rotary_dim.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        sizes: LatentSizes,
        *,
        norm_eps: float = 1e-6,
        score_factor: float = 1.0,
        interleaved: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if min(width, num_heads, *sizes[1:]) < 1 or sizes.query_rank < 0 or sizes.rotary_dim % 2:
            told = ", ".join(f"{name} {size}" for name, size in sizes._asdict().items())
            raise UserError(
                f"latent attention with num_heads {num_heads}, {told}; allowed: 1 or more of each, "
                "query_rank 0 for none, an even rotary_dim"
            )
        self.num_heads, self.sizes, self.interleaved = num_heads, sizes, interleaved
        self.absorbed: bool | None = None
        self.scale = score_factor / math.sqrt(sizes.head_dim + sizes.rotary_dim)
        own = num_heads * (sizes.head_dim + sizes.rotary_dim)
        if sizes.query_rank:
            self.query_down = nn.Linear(width, sizes.query_rank, bias=bias)
            self.query_norm = RMSNorm(sizes.query_rank, norm_eps)
        self.query = nn.Linear(sizes.query_rank or width, own, bias=False)
        self.kv_down = nn.Linear(width, sizes.kv_rank + sizes.rotary_dim, bias=bias)
        self.kv_norm = RMSNorm(sizes.kv_rank, norm_eps)
        self.kv_up = nn.Linear(sizes.kv_rank, num_heads * (sizes.head_dim + sizes.value_dim), bias=False)
        self.output = nn.Linear(num_heads * sizes.value_dim, width, bias=bias)
        for given in (linear.bias for linear in self.projections):
            if given is not None:
                nn.init.zeros_(given)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """The linear maps, each met by every token."""
        down = (self.query_down,) if self.sizes.query_rank else ()
        return *down, self.query, self.kv_down, self.kv_up, self.output

    @property
    def numbers_per_pair(self) -> int:
        """Numbers that a query multiplies with a key and its value, over all heads, in the full form."""
        sizes = self.sizes
        return self.num_heads * (sizes.head_dim + sizes.rotary_dim + sizes.value_dim)

    @property
    def cached_numbers(self) -> int:
        """Numbers that a cache keeps of each token."""
        return self.sizes.kv_rank + self.sizes.rotary_dim

    def keys_met(self, context: int) -> float:
        """Return how many keys a token meets on average, in texts of `context` tokens."""
        return (context + 1) / 2

    def new_cache(
        self, batch: int, capacity: int, like: Float[Tensor, "..."], dtype: torch.dtype
    ) -> LayerCache:
        """Return an empty cache for `batch` texts of up to `capacity` positions, on `like`'s device."""
        keys = like.new_zeros((batch, 1, capacity, self.cached_numbers), dtype=dtype)
        return LayerCache(keys, keys.new_zeros((batch, 1, capacity, 0)))

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        cos: Float[Tensor, "S rotary"],
        sin: Float[Tensor, "S rotary"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Return attention over x and, with a cache, over everything before it; the cache is extended."""
        sizes = self.sizes
        if cos.shape[-1] != sizes.rotary_dim:
            raise UserError(f"{cos.shape[-1]} rotary numbers; allowed: rotary_dim {sizes.rotary_dim}")
        first = self.query_down if sizes.query_rank else self.query
        queries, down = apply_linears(x, (first, self.kv_down))
        if sizes.query_rank:
            (queries,) = apply_linears(self.query_norm(queries), (self.query,))
        latents, k_turned = down.split([sizes.kv_rank, sizes.rotary_dim], dim=-1)
        # Both stand before the heads: latents of one head, [B, 1, S, ...].
        latents = self.kv_norm(latents.contiguous()).unsqueeze(1)
        q = queries.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q_plain, q_turned = q.split([sizes.head_dim, sizes.rotary_dim], dim=-1)
        q_turned, k_turned = turn_pair(q_turned, k_turned.unsqueeze(1), cos, sin, self.interleaved)
        past, length = 0, x.shape[1]
        keys = torch.cat([latents.to(k_turned.dtype), k_turned], dim=-1)
        if cache is not None:
            past = cache.length
            keys = cache.append(keys, keys[..., :0])[0].to(q.dtype)
        if self.absorbed is None:
            absorbed = cache is not None and self._absorbing_pays(length)
        else:
            absorbed = self.absorbed
        attended = self._absorbed if absorbed else self._full
        y = attended(q_plain, q_turned, keys, past)
        (out,) = apply_linears(y.transpose(1, 2).flatten(-2), (self.output,))
        return out

    def _absorbing_pays(self, length: int) -> bool:
        """Return whether `length` queries cost less over latents than over keys and values that are made of
        them first; both grow with the number of keys alike.
        """
        s = self.sizes
        more = 2 * s.kv_rank + s.rotary_dim - (s.head_dim + s.rotary_dim + s.value_dim)
        return length * more < s.kv_rank * (s.head_dim + s.value_dim)

    def _full(self, q_plain: Tensor, q_turned: Tensor, keys: Tensor, past: int) -> Tensor:
        """Return each head's sum of values, [B, H, S, value_dim], over keys and values of every head."""
        s = self.sizes
        latents, k_turned = keys.split([s.kv_rank, s.rotary_dim], dim=-1)
        (up,) = apply_linears(latents.squeeze(1), (self.kv_up,))
        k_plain, v = (
            up.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split([s.head_dim, s.value_dim], dim=-1)
        )
        k = torch.cat([k_plain, k_turned.expand(-1, self.num_heads, -1, -1).to(k_plain.dtype)], dim=-1)
        q = torch.cat([q_plain, q_turned], dim=-1)
        return attend_within(q, k, v, past, scale=self.scale)

    def _absorbed(self, q_plain: Tensor, q_turned: Tensor, keys: Tensor, past: int) -> Tensor:
        """Return the same from the latents alone."""
        s = self.sizes
        w_key, w_value = self.kv_up.weight.unflatten(0, (self.num_heads, -1)).split(
            [s.head_dim, s.value_dim], dim=1
        )
        q = torch.cat([q_plain @ w_key, q_turned], dim=-1)
        y = attend_within(q, keys, keys[..., : s.kv_rank], past, scale=self.scale)
        return y @ w_value.transpose(1, 2)
