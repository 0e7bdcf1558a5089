"""Routing groups: tokens in flat order, `group_size` at a time, each counted on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gatewright.errors import UserError


def check_group_size(group_size: int | None) -> None:
    """Raise UserError unless there are no groups or they hold at least one token."""
    if group_size is not None and group_size < 1:
        raise UserError(f"group_size {group_size}; allowed: 1 or more tokens, or none for one group")


def num_groups(num_tokens: int, group_size: int | None) -> int:
    """Return G, the groups that T tokens make; the last one may be smaller. No tokens make one group."""
    if group_size is None or num_tokens == 0:
        return 1
    return -(-num_tokens // group_size)


def group_ids(num_tokens: int, group_size: int | None, device: torch.device) -> Int64[Tensor, "T"]:
    """Return each token's group, [T] int64."""
    if group_size is None or num_groups(num_tokens, group_size) == 1:
        return torch.zeros(num_tokens, dtype=torch.int64, device=device)
    return torch.arange(num_tokens, device=device) // group_size


def to_groups(
    values: Float[Tensor, "T E"] | Bool[Tensor, "T E"] | Int64[Tensor, "T E"], group_size: int | None
) -> Float[Tensor, "G S E"] | Bool[Tensor, "G S E"] | Int64[Tensor, "G S E"]:
    """Return values [T, E] as [G, S, E]; the places that the last group lacks are 0 or False."""
    num_tokens = values.shape[0]
    count = num_groups(num_tokens, group_size)
    size = num_tokens if group_size is None or num_tokens == 0 else group_size
    if count * size != num_tokens:
        values = F.pad(values, (0, 0, 0, count * size - num_tokens))
    return values.reshape(count, size, values.shape[1])


def from_groups(
    values: Float[Tensor, "G S E"] | Bool[Tensor, "G S E"] | Int64[Tensor, "G S E"], num_tokens: int
) -> Float[Tensor, "T E"] | Bool[Tensor, "T E"] | Int64[Tensor, "T E"]:
    """Return what `to_groups` took apart, [G, S, E] -> [T, E]."""
    return values.flatten(0, 1)[:num_tokens]


def real_tokens(mask: Bool[Tensor, "T"] | None, num_tokens: int, device: torch.device) -> Bool[Tensor, "T"]:
    """Return the mask [T], all True where none is given."""
    return torch.ones(num_tokens, dtype=torch.bool, device=device) if mask is None else mask


def tokens_of_groups(
    mask: Bool[Tensor, "T"] | None, num_tokens: int, group_size: int | None, device: torch.device
) -> Int64[Tensor, "G"]:
    """Return how many real tokens each group holds, [G] int64."""
    if mask is not None:
        return to_groups(mask.unsqueeze(-1), group_size).sum(dim=(1, 2))
    count = num_groups(num_tokens, group_size)
    if group_size is None or count == 1:
        return torch.full((1,), num_tokens, dtype=torch.int64, device=device)
    # The last group has what the others leave.
    return (num_tokens - group_size * torch.arange(count, device=device)).clamp(max=group_size)


def count_into(bins: Int64[Tensor, "N"], num_bins: int) -> Int64[Tensor, "bins"]:
    """Return how often each number from 0 to num_bins - 1 stands in `bins` [N]."""
    if bins.is_cpu and not torch.compiler.is_compiling():
        return torch.bincount(bins, minlength=num_bins)
    # A GPU would wait for the numbers, and compiled code would not know the shape.
    counts = torch.zeros(num_bins, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))
