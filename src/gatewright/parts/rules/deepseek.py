"""DeepSeek's routers by name: DeepSeekMoE, V2, V3, V4, and V2's device limit at any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gatewright.parts.router import Router
from gatewright.parts.routing import check_selection
from gatewright.parts.rules.group_limited import make_group_limited
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.token_choice import TokenChoice


def _one_group(num_experts: int, num_selected: int, groups_kept: int) -> tuple[int, int]:
    return 1, 1


def _published_groups(num_experts: int, num_selected: int, groups_kept: int) -> tuple[int, int]:
    """Return DeepSeek's 8 groups, of which `groups_kept`; one group where E is small for that."""
    fits = num_experts >= 16 and num_experts % 8 == 0 and num_selected <= groups_kept * num_experts // 8
    return (8, groups_kept) if fits else (1, 1)


def _devices(num_experts: int, num_selected: int, groups_kept: int) -> tuple[int, int]:
    """Return the most devices, of 8, 4, 2 and 1, that hold two experts or more, and how many are kept."""
    groups = next(g for g in (8, 4, 2, 1) if g == 1 or (num_experts % g == 0 and num_experts >= 2 * g))
    least = -(-num_selected * groups // num_experts)
    return groups, min(groups, max(groups_kept, least))


def _make(groups: Callable[[int, int, int], tuple[int, int]], kept: int, **fixed: Any) -> Any:
    """Return `make` for a router with `fixed` settings; `groups(E, K, kept)` says how many where the user
    does not.
    """

    def make(
        width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32, **options: Any
    ) -> Router:
        settings = {**fixed, **options}
        if settings.get("num_groups") is None and settings.get("groups_kept") is None:
            settings["num_groups"], settings["groups_kept"] = groups(num_experts, num_selected, kept)
        return make_group_limited(width, num_experts, num_selected, dtype, **settings)

    return make


def _make_deepseek_moe(
    width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    settings = {"weights": "raw", **options}
    check_selection(num_experts, num_selected, settings["weights"])
    return Router(width, num_experts, dtype, rule=TokenChoice(num_selected, **settings))


register(
    RouterInfo(
        name="deepseek_moe",
        scores="softmax",
        selection="each token its K best experts, beside shared ones",
        weights="raw scores",
        capacity="none",
        losses=("balance", "device"),
        causal=True,
        used_by="DeepSeekMoE 2B, 16B",
        source="DeepSeekMoE (arXiv 2401.06066)",
        make=_make_deepseek_moe,
    )
)
register(
    RouterInfo(
        name="device_limited",
        scores="softmax",
        selection="each token its K best experts on its M best devices (by their best expert)",
        weights="raw scores",
        capacity="none",
        losses=("balance", "device", "communication"),
        causal=True,
        used_by="DeepSeek-V2's rule at any size: D and M are num_groups and groups_kept",
        source="DeepSeek-V2 (arXiv 2405.04434)",
        make=_make(_devices, 3, scores="softmax", group_score="max", weights="raw"),
    )
)
register(
    RouterInfo(
        name="deepseek_v2",
        scores="softmax",
        selection="each token its K best experts in its 3 best of 8 groups; one group below 16 experts",
        weights="raw scores; scale 1 (Lite), 16 for the 236B model",
        capacity="none",
        losses=("balance", "device", "communication"),
        causal=True,
        used_by="DeepSeek-V2",
        source="DeepSeek-V2 (arXiv 2405.04434)",
        make=_make(_published_groups, 3, scores="softmax", group_score="max", weights="raw"),
    )
)
register(
    RouterInfo(
        name="deepseek_v3",
        scores="sigmoid",
        selection="by score + learned bias: K best experts in the 4 best of 8 groups; one below 16 experts",
        weights="unbiased scores, renormalised over the chosen, times 2.5",
        capacity="none",
        losses=("sequence_balance",),
        causal=True,
        used_by="DeepSeek-V3, R1",
        source="DeepSeek-V3 eq 12-16",
        make=_make(
            _published_groups,
            4,
            scores="sigmoid",
            group_score="top2",
            weights="renormalised",
            scale=2.5,
            rate=1e-3,
        ),
    )
)
register(
    RouterInfo(
        name="deepseek_v4",
        scores="sqrt(softplus)",
        selection="by score + learned bias: each token its K best experts",
        weights="unbiased scores, renormalised over the chosen, times 1.5",
        capacity="none",
        losses=(),
        causal=True,
        used_by="DeepSeek-V4",
        source="released inference code of DeepSeek-V4",
        make=_make(_one_group, 1, scores="sqrt_softplus", weights="renormalised", scale=1.5, rate=1e-3),
    )
)
