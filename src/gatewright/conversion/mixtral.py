"""Mixtral's experts as transformers has them, alone: a rival to be timed, and a module to try backends on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn


def mixtral_experts(width: int, num_experts: int, expert_width: int, implementation: str) -> nn.Module:
    """Return the module, which takes (x [T, D], expert ids [T, K], weights [T, K]); `implementation` is one
    of transformers' names. Its weights are not initialised.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config: Any = SimpleNamespace(
        num_local_experts=num_experts,
        hidden_size=width,
        intermediate_size=expert_width,
        hidden_act="silu",
        _experts_implementation=implementation,
    )
    experts: nn.Module = MixtralExperts(config)
    return experts
