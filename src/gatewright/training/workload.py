"""How many tokens an expert meets in an optimizer step: what a sparse model's arithmetic is spread over."""

from __future__ import annotations

from torch import nn

from gatewright.backbones import EncoderDecoder
from gatewright.parts import MoELayer

FEW_TOKENS = 256


def tokens_per_expert(model: nn.Module, step_tokens: float, texts: int = 1) -> float | None:
    """Return r = T K / E of an optimizer step of T tokens, the least of all layers; None for a dense model.

    Experts that are mixtures themselves share the tokens of their own expert. The stacks of an encoder-
    decoder meet `texts` sources and as many targets, of their own lengths.
    """
    if isinstance(model, EncoderDecoder):
        stacks = ((model.encoder, model.context), (model.decoder, model.target_context))
        found = [rate for stack, length in stacks for rate in _rates(stack, texts * length)]
    else:
        found = _rates(model, step_tokens)
    return min(found) if found else None


def _rates(module: nn.Module, tokens: float) -> list[float]:
    if isinstance(module, MoELayer):
        own = tokens * float(module.num_selected) / module.num_experts
        return [own, *_rates(module.experts, own)]
    return [rate for child in module.children() for rate in _rates(child, tokens)]


def workload_lines(name: str, rate: float | None) -> list[str]:
    """Return what a run says of it when it begins: nothing of a dense model, two lines where it is low."""
    if rate is None:
        return []
    lines = [f"{name}: {rate:,.4g} tokens per expert and optimizer step"]
    if rate < FEW_TOKENS:
        lines.append(
            f"{name}: warning: below {FEW_TOKENS}, the optimizer, which passes over all experts however few "
            "tokens they got, is a large share of each step; give more --batch-tokens (--accumulation splits "
            "them where memory is short) or take fewer experts"
        )
    return lines
