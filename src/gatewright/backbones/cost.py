"""Parameters and floating-point operations of a backbone, counted from its modules; works on the meta
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gatewright.backbones.attention import Attention
from gatewright.backbones.transformer import Decoder
from gatewright.errors import UserError
from gatewright.parts import MLP, MoELayer

_DRAWS = {nn.init.normal_, nn.init.trunc_normal_, nn.init.uniform_, nn.init.kaiming_uniform_}
_DRAWS |= {Tensor.normal_, Tensor.uniform_}


class _WithoutDraws(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def on_no_memory() -> Iterator[None]:
    """Within it, build models of any size as shapes alone: on the meta device, no weight drawn.

    A draw on the meta device would make torch load its compiler: seconds, for numbers that do not exist.
    Raises: UserError for sizes that no tensor can have.
    """
    try:
        with torch.device("meta"), _WithoutDraws():
            yield
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"no model can have these sizes ({reason}); allowed: smaller ones") from None


@dataclass(frozen=True)
class Cost:
    """What a model weighs and costs.

    `total_parameters`; `active_parameters`: those that one token meets (all but the unchosen experts).
    `flops`: forward floating-point operations per token by part (embedding, attention_projections,
    attention_scores, router, experts, shared_experts, dense_ffn, head), a multiply-add counting 2; training
    takes 3 times the forward pass.
    """

    total_parameters: int
    active_parameters: int
    flops: dict[str, float] = field(default_factory=dict)

    @property
    def forward_flops_per_token(self) -> float:
        """Sum of all parts."""
        return sum(self.flops.values())

    @property
    def train_flops_per_token(self) -> float:
        """Forward plus backward: 3 times forward."""
        return 3 * self.forward_flops_per_token


def count_cost(model: nn.Module, context: int) -> Cost:
    """Return the Cost of a Decoder per token, at sequences of `context` tokens.

    Causal attention meets (context + 1) / 2 keys on average. Norms, activations, softmax and the optimizer
    are not counted.
    """
    if not isinstance(model, Decoder):
        raise UserError(f"cost of a {type(model).__name__} is not known; allowed: a Decoder")
    flops = dict.fromkeys(
        (
            "attention_projections",
            "attention_scores",
            "router",
            "experts",
            "shared_experts",
            "dense_ffn",
            "head",
        ),
        0.0,
    )
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for module in model.modules():
        if isinstance(module, Attention):
            projections = (module.query, module.key, module.value, module.output)
            flops["attention_projections"] += 2 * sum(p.weight.numel() for p in projections)
            flops["attention_scores"] += 2 * 2 * module.num_heads * module.head_dim * (context + 1) / 2
        elif isinstance(module, MoELayer):
            experts = sum(p.numel() for p in module.experts.parameters())
            one = experts // module.num_experts
            idle += experts - one * module.num_selected
            flops["router"] += 2 * module.router.weight.numel()
            flops["experts"] += 2 * one * module.num_selected
            if module.shared is not None:
                flops["shared_experts"] += 2 * sum(p.numel() for p in module.shared.parameters())
    for block in model.layers:
        if isinstance(block.feed_forward, MLP):
            flops["dense_ffn"] += 2 * sum(p.numel() for p in block.feed_forward.parameters())
    flops["head"] = 2.0 * model.vocab_size * model.width
    return Cost(total_parameters=total, active_parameters=total - idle, flops=flops)
