"""The experiments on Mixtral, OLMoE and DeepSeek-V3 that train the papers' own models, by target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gatewright.experiments import (
    balance_scope,
    deepseek_mtp,
    mixtral_passkey,
    mixtral_routing,
    olmoe_dense,
    olmoe_stability,
)
from gatewright.experiments.trial_pages import Result

MODERN: dict[str, tuple[str, Callable[[Path, bool], Result]]] = {
    "deepseek_v3/mtp": (deepseek_mtp.CLAIM, deepseek_mtp.run_mtp),
    "deepseek_v3/scope": (balance_scope.CLAIM, balance_scope.run_scope),
    "mixtral/passkey": (mixtral_passkey.CLAIM, mixtral_passkey.run_passkey),
    "mixtral/routing": (mixtral_routing.CLAIM, mixtral_routing.run_routing),
    "olmoe/dense": (olmoe_dense.CLAIM, olmoe_dense.run_olmoe_dense),
    "olmoe/stability": (olmoe_stability.CLAIM, olmoe_stability.run_stability),
}
