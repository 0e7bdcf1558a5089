"""Multiplying tokens by random factors close to 1, a cache's worth at a time."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from gatewright.parts.draws import CHUNK, Stream, halves, in_chunks, runs_native


def jittered(x: Float[Tensor, "T D"], key: Int64[Tensor, ""], eps: float) -> Float[Tensor, "T D"]:
    """Return x (1 + eps u), u = `centred(key, [T, D])`, uniform in [-1, 1); with gradient to x."""
    return _Jitter.apply(x, key, eps)


class _Jitter(torch.autograd.Function):
    """Keeps half a word per element, where x * u would keep x and u; in C++ nothing: it draws again."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "T D"], key: Int64[Tensor, ""], eps: float
    ) -> Float[Tensor, "T D"]:
        ctx.eps, size = eps, (x.numel() + 1) // 2
        stream = Stream(key, x.device)
        ctx.again = runs_native(size, x)
        if ctx.again:
            ctx.save_for_backward(stream.start, stream.step)
            return torch.ops.gatewright.jitter(x, stream.start, stream.step, eps)
        if not in_chunks(x.device, size):
            words = stream.words(size)
            out = _spread(x, words, eps)
        else:
            flat = x.reshape(-1)
            out, words = (
                torch.empty_like(flat),
                torch.empty(size if ctx.needs_input_grad[0] else 0, dtype=torch.int32),
            )
            for begin, own in stream.chunks(size):
                place = slice(2 * begin, 2 * (begin + own.shape[0]))
                _spread(flat[place], own, eps, out[place])
                if words.numel():
                    words[begin : begin + own.shape[0]] = own
            out = out.view(x.shape)
        ctx.save_for_backward(words)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.again:
            return torch.ops.gatewright.jitter(gradient.contiguous(), *ctx.saved_tensors, ctx.eps), None, None
        (words,) = ctx.saved_tensors
        if not in_chunks(words.device, words.numel()):
            return _spread(gradient, words, ctx.eps), None, None
        flat = gradient.reshape(-1)
        out, most = torch.empty_like(flat), CHUNK
        for begin in range(0, words.shape[0], most):
            place = slice(2 * begin, 2 * (begin + most))
            _spread(flat[place], words[begin : begin + most], ctx.eps, out[place])
        return out.view(gradient.shape), None, None


def _spread(x: Tensor, words: Int32[Tensor, "N"], eps: float, out: Tensor | None = None) -> Tensor:
    """Return x (1 + eps u), u the words' halves / 2 ** 15."""
    factor = halves(words)[: x.numel()].to(x.dtype).view(x.shape)
    factor.mul_(eps * 2.0**-15).add_(1)
    # Each operation rounds by itself: fused ones would round otherwise at the ends of vectors.
    return torch.mul(x, factor) if out is None else torch.mul(x, factor, out=out)
