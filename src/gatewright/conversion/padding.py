"""Texts of unequal length in one batch, as transformers gives them: with padding and a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.errors import UserError


def read_padded(model: Decoder, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return logits [B, S, V] of tokens [B, S], 0 where `mask` [B, S] is: padding is neither read nor seen.

    Texts of one length are read together, without their padding: a text's first token has position 0 however
    it is padded, and no expert sees a token that is none. Gradients flow.
    Raises: UserError for a mask with holes, or of another shape.
    """
    if mask.shape != tokens.shape:
        raise UserError(f"mask {list(mask.shape)} for tokens {list(tokens.shape)}; allowed: equal shapes")
    mask = mask.bool()
    lengths = mask.sum(dim=1)
    starts = mask.int().argmax(dim=1)
    places = torch.arange(mask.shape[1], device=mask.device)
    inside = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
    if not torch.equal(inside, mask):
        raise UserError("a mask with a hole in a text; allowed: padding before or behind it")
    rows, found = [], []
    for length in sorted({int(n) for n in lengths} - {0}):
        own = (lengths == length).nonzero().squeeze(-1)
        texts = tokens[own][mask[own]].unflatten(0, (len(own), length))
        rows.append((own[:, None] * mask.shape[1] + starts[own, None] + places[:length]).flatten())
        found.append(model(texts, with_stats=False).logits.flatten(0, 1))
    if not found:
        raise UserError("no token that is none of the padding; allowed: one or more texts")
    logits = torch.cat(found)
    whole = logits.new_zeros(mask.numel(), logits.shape[-1])
    return whole.index_copy(0, torch.cat(rows), logits).unflatten(0, tuple(mask.shape))
