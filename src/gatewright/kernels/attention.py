"""Causal attention: its definition, and the forms that compute it, one meaning for all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.kernels.native import attention as native_attention

SWITCH = "GATEWRIGHT_ATTENTION"
# Keys below which plain matmuls beat torch's flash attention in bf16 on a CPU.
_SHORT = 1024


def attend(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv P head_dim"],
    v: Float[Tensor, "B Hkv P head_dim"],
    past: int = 0,
    form: str | None = None,
) -> Float[Tensor, "B H S head_dim"]:
    """Return causal attention of q, in q's dtype: query i, at position past + i, sees keys 0 .. past + i.

    Equation: softmax(q k^T / sqrt(head_dim)) v, key head j serving query heads j H / Hkv and those behind it.
    Args: P = past + S; keys and values may have another dtype than q (a cache); any strides; `form` as
    `choose_attention` takes it.
    Raises: UserError for an unknown form, and for "native" where it does not take these tensors.
    """
    if k.shape[2] != past + q.shape[2] or q.shape[1] % k.shape[1]:
        raise UserError(
            f"attention of {q.shape[2]} positions behind {past} over {k.shape[2]} keys, {q.shape[1]} heads "
            f"over {k.shape[1]}; allowed: a key for each position, key heads that divide the heads"
        )
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # as it would narrow torch's operators
        q, k, v = (one.to(torch.get_autocast_dtype("cpu")) for one in (q, k, v))
    if k.dtype != q.dtype and not native_attention.takes(q, k):
        k, v = k.to(q.dtype), v.to(q.dtype)
    chosen, reason = choose_attention(q, k, form)
    if chosen == "native" and not native_attention.takes(q, k):
        raise UserError(f"attention form 'native' does not take these tensors: {reason}")
    if chosen != "native":
        k, v = k.to(q.dtype), v.to(q.dtype)
    return FORMS[chosen](q, k, v, past)


def choose_attention(
    q: Float[Tensor, "B H S head_dim"], k: Float[Tensor, "B Hkv P head_dim"], form: str | None = None
) -> tuple[str, str]:
    """Return (form, reason) for these queries and keys: "native", "flash" or "matmul". `form` None, and no
    GATEWRIGHT_ATTENTION in the environment, lets the toolkit choose; a name is taken as given.

    The choice depends on shapes, dtypes, device and the build alone: never on a clock, so that a run that
    is repeated or resumed on a machine has the same bits.
    Raises: UserError for an unknown form.
    """
    if form is None and (torch.compiler.is_compiling() or torch.compiler.is_exporting()):
        return "flash", "compiled and exported programs hold torch's own operators alone"
    named = form or os.environ.get(SWITCH)
    if named:
        if named not in FORMS:
            given = f"attention form {named!r}" if form else f"{SWITCH}={named}"
            raise UserError(f"{given} is unknown{did_you_mean(named, FORMS)}; allowed: {', '.join(FORMS)}")
        if form or named != "native" or native_attention.takes(q, k):
            return named, "asked for by name"
    if native_attention.takes(q, k):
        return "native", "fastest on a CPU: C++ kernels, built for this machine"
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] < _SHORT:
        return "matmul", f"torch's flash attention is slow in bf16 on a CPU below {_SHORT} keys"
    return (
        "flash",
        f"the native kernels do not take {q.dtype} of head_dim {q.shape[3]} on {q.device.type} here",
    )


def by_matmuls(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv P head_dim"],
    v: Float[Tensor, "B Hkv P head_dim"],
    past: int = 0,
) -> Float[Tensor, "B H S head_dim"]:
    """Return causal attention by its definition: all scores at once, in q's dtype, on any device."""
    shared = q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (k.shape[1], shared))
    scores = queries @ k.unsqueeze(2).transpose(-1, -2) / math.sqrt(q.shape[3])
    rows = torch.arange(past, k.shape[2], device=q.device).unsqueeze(-1)
    hidden = torch.arange(k.shape[2], device=q.device) > rows
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def by_flash(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv P head_dim"],
    v: Float[Tensor, "B Hkv P head_dim"],
    past: int = 0,
) -> Float[Tensor, "B H S head_dim"]:
    """Return causal attention by torch's scaled_dot_product_attention, whose kernel depends on the device."""
    mask = None
    if past and q.shape[2] > 1:
        rows = torch.arange(past, k.shape[2], device=q.device).unsqueeze(-1)
        mask = torch.arange(k.shape[2], device=q.device) <= rows
    causal, grouped = past == 0, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


Form = Callable[[Tensor, Tensor, Tensor, int], Tensor]
FORMS: dict[str, Form] = {"native": native_attention.attend, "flash": by_flash, "matmul": by_matmuls}
