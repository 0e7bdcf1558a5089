"""Attention as T5 has it: positions are a learned bias of the scores, shared by all layers of a stack."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import apply_linears
from gatewright.kernels.biased_attention import attend_biased


@cache
def _thresholds(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Return the distances at which the buckets 1, 2, ... of one direction begin.

    In whole numbers, so that no rounding of a logarithm moves a distance to the bucket beside it.
    """
    exact = num_buckets // 2
    rest = num_buckets - exact
    starts = list(range(1, exact + 1))
    for j in range(1, rest):
        # floor(log(d / exact) / log(max_distance / exact) * rest) >= j, both sides as powers.
        least, start = exact ** (rest - j) * max_distance**j, starts[-1]
        while start**rest < least:
            start += 1
        starts.append(start)
    return tuple(starts)


def relative_buckets(
    offsets: Int64[Tensor, "S P"], num_buckets: int = 32, max_distance: int = 128, *, both_ways: bool = True
) -> Int64[Tensor, "S P"]:
    """Return the bucket of each offset, the key's position less the query's.

    Equation (Raffel et al. 2020, section 2.1, and the authors' code): with n buckets for a direction and
    m = n // 2, a distance d < m has bucket d, and others min(n - 1, m + floor((n - m) log(d / m) /
    log(max_distance / m))). `both_ways` gives each direction half of the buckets, keys behind the query the
    upper half; without it a key behind the query counts as distance 0 (a causal mask hides it).
    """
    own = num_buckets // 2 if both_ways else num_buckets
    starts = torch.tensor(_thresholds(own, max_distance), device=offsets.device)
    if not both_ways:
        return torch.bucketize((-offsets).clamp(min=0), starts, right=True)
    return torch.bucketize(offsets.abs(), starts, right=True) + own * (offsets > 0)


class RelativeBias(nn.Module):
    """One number per bucket and head, `weight` [num_buckets, H], added to a stack's attention scores.

    Args: `both_ways` as `relative_buckets` takes it: True in an encoder, False in a decoder.
    Raises: UserError for too few buckets, or distances that all have a bucket of their own.
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, *, both_ways: bool
    ) -> None:
        super().__init__()
        own = num_buckets // 2 if both_ways else num_buckets
        if own < 2 or max_distance <= own // 2:
            raise UserError(
                f"num_buckets {num_buckets}, max_distance {max_distance}; allowed: 2 or more buckets for "
                "each direction, and a distance beyond those that have a bucket of their own"
            )
        self.num_buckets, self.max_distance, self.both_ways = num_buckets, max_distance, both_ways
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights with std num_heads ** -0.5."""
        nn.init.trunc_normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, length: int, past: int = 0) -> Float[Tensor, "1 H S P"]:
        """Return the bias of `length` queries behind `past` keys over all past + length keys; where only one
        way is seen, -inf for the keys behind each query.
        """
        device = self.weight.device
        keys = torch.arange(past + length, device=device)
        offsets = keys - torch.arange(past, past + length, device=device).unsqueeze(-1)
        buckets = relative_buckets(offsets, self.num_buckets, self.max_distance, both_ways=self.both_ways)
        bias = self.weight[buckets].permute(2, 0, 1).unsqueeze(0)
        return bias if self.both_ways else bias.masked_fill(offsets > 0, -torch.inf)


def padding_bias(
    mask: Tensor | None, batch: int, length: int, like: Float[Tensor, "..."]
) -> Float[Tensor, "#B 1 1 P"]:
    """Return 0 for the real keys of `mask` [B, P] bool and -inf for padding; without a mask, all 0."""
    if mask is None:
        return like.new_zeros(1, 1, 1, length)
    if mask.shape != (batch, length) or mask.dtype != torch.bool:
        raise UserError(
            f"source_mask {mask.dtype} {list(mask.shape)}; allowed: torch.bool {[batch, length]}, False is "
            "padding; give one value per token"
        )
    hidden = torch.zeros(batch, 1, 1, length, dtype=like.dtype, device=like.device)
    return hidden.masked_fill(~mask[:, None, None, :], -torch.inf)


class BiasedAttention(nn.Module):
    """Attention of H heads without position of its own, no biases in its maps: x [B, S, D] looks at keys and
    values that `keys_and_values` made of the same text or of another one.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        if min(width, num_heads, head_dim) < 1:
            raise UserError(f"width {width}, num_heads {num_heads}, head_dim {head_dim}; allowed: 1 or more")
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale
        self.query = nn.Linear(width, num_heads * head_dim, bias=False)
        self.key = nn.Linear(width, num_heads * head_dim, bias=False)
        self.value = nn.Linear(width, num_heads * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, width, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def keys_and_values(
        self, x: Float[Tensor, "B P D"]
    ) -> tuple[Float[Tensor, "B H P head_dim"], Float[Tensor, "B H P head_dim"]]:
        """Return the keys and the values of x, each [B, H, P, head_dim]."""
        keys, values = apply_linears(x, (self.key, self.value))
        return self._heads(keys), self._heads(values)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        keys: Float[Tensor, "B H P head_dim"],
        values: Float[Tensor, "B H P head_dim"],
        bias: Float[Tensor, "#B #H #S P"],
    ) -> Float[Tensor, "B S D"]:
        """Return what x reads from the values: [B, S, D]."""
        (queries,) = apply_linears(x, (self.query,))
        y = attend_biased(self._heads(queries), keys, values, bias, self.scale)
        (out,) = apply_linears(y.transpose(1, 2).flatten(-2), (self.output,))
        return out
