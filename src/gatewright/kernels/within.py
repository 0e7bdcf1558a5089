"""Causal attention that sees a part of the past, has sinks, another scale, or values of another size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels.attention import attend

# Positions up to which all scores at once cost less than values padded to the keys' size.
_FEW = 16


def attend_within(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv P head_dim"],
    v: Float[Tensor, "B Hkv P value_dim"],
    past: int = 0,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunked: bool = False,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H S value_dim"]:
    """Return causal attention of q, in q's dtype: query i, at position p = past + i, sees keys up to p.

    Equation: weights = softmax(scale q k^T, s)[all but the last], y = weights v; s is the head's sink, a
    score without a value, so that a head may attend to little (gpt-oss); no sink, no s.
    Args: `scale` None is 1 / sqrt(head_dim). `window` W hides all but the last W keys, the token's own among
    them (Mistral, gpt-oss); with `chunked`, all keys before W floor(p / W) (Llama 4). Where nothing of this
    makes a difference, it is `attend`, and as fast.
    Raises: UserError for a window below 1, and what `attend` refuses.
    """
    if window is not None and window < 1:
        raise UserError(f"attention window {window}; allowed: 1 or more, or none for all of the past")
    if window is not None:
        first = past // window * window if chunked else max(0, past - window + 1)
        k, v, past = k[:, :, first:], v[:, :, first:], past - first
    hides = window is not None and k.shape[2] > window
    extra = q.shape[3] - v.shape[3]
    if hides or sinks is not None or extra < 0 or (extra and q.shape[2] <= _FEW):
        return _by_scores(q, k, v, past, scale, window, chunked, sinks)
    if scale is not None:
        q = q * (scale * math.sqrt(q.shape[3]))
    if extra:
        return attend(q, k, F.pad(v, (0, extra)), past)[..., : v.shape[3]]
    return attend(q, k, v, past)


def _by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: int,
    scale: float | None,
    window: int | None,
    chunked: bool,
    sinks: Tensor | None,
) -> Tensor:
    """Return the definition: all scores at once, their softmax in at least fp32."""
    if k.shape[2] != past + q.shape[2] or q.shape[1] % k.shape[1]:
        raise UserError(
            f"attention of {q.shape[2]} positions behind {past} over {k.shape[2]} keys, {q.shape[1]} heads "
            f"over {k.shape[1]}; allowed: a key for each position, key heads that divide the heads"
        )
    k, v = k.to(q.dtype), v.to(q.dtype)
    queries = q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    scores = queries @ k.unsqueeze(2).transpose(-1, -2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    scores = scores.masked_fill(_hidden(past, k.shape[2], window, chunked, q.device), -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        own = sinks.to(wide).view(1, *queries.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, own], dim=-1).softmax(-1)[..., :-1]
    return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


def _hidden(past: int, keys: int, window: int | None, chunked: bool, device: torch.device) -> Tensor:
    """Return which keys each query does not see, [S, P]; positions begin at 0, or at a chunk's begin."""
    rows = torch.arange(past, keys, device=device).unsqueeze(-1)
    columns = torch.arange(keys, device=device)
    hidden = columns > rows
    if window is None:
        return hidden
    return hidden | (columns // window < rows // window if chunked else columns <= rows - window)
