"""The experiments on Mixtral, OLMoE and DeepSeek-V3 that train the papers' own models, by target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gatewright.experiments import deepseek_mtp, mixtral_routing, olmoe_dense
from gatewright.experiments.trial_pages import Result

MODERN: dict[str, tuple[str, Callable[[Path, bool], Result]]] = {
    "deepseek_v3/mtp": (deepseek_mtp.CLAIM, deepseek_mtp.run_mtp),
    "mixtral/routing": (mixtral_routing.CLAIM, mixtral_routing.run_routing),
    "olmoe/dense": (olmoe_dense.CLAIM, olmoe_dense.run_olmoe_dense),
}
