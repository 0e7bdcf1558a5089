"""A small layer with any named router, and tokens for it."""

from __future__ import annotations

import torch
from torch import Tensor

from gatewright.parts import MoELayer, RouterInfo, Stats, build_router

WIDTH, NUM_EXPERTS, EXPERT_WIDTH, VOCABULARY = 16, 8, 4, 64
KEY = torch.tensor(7)


def layer_of(info: RouterInfo, seed: int = 0, **options: object) -> MoELayer:
    """Return a layer with this router, all its parameters drawn, in training mode."""
    torch.manual_seed(seed)
    num_experts = 1 if info.name == "mixture_of_depths" else NUM_EXPERTS
    num_selected = {"dense": num_experts, "mixture_of_depths": 1, "hierarchical": 4}.get(info.name, 2)
    selected = info.fixed_selected or num_selected
    router = build_router(info.name, WIDTH, num_experts, selected)
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return MoELayer(WIDTH, num_experts, selected, EXPERT_WIDTH, router=router, **options)  # type: ignore[arg-type]


def tokens(num_tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return x [1, S, D] and token ids [1, S]."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (1, num_tokens), generator=draw)
    return torch.randn(1, num_tokens, WIDTH, generator=draw), ids


def losses(stats: Stats) -> Tensor:
    """Return the sum of everything in the records that carries a gradient, unevenly weighed."""
    record = stats["router"]
    own = [value.float().flatten() for value in record.sums.values() if value.requires_grad]
    parts = [record.score_sums.square(), record.logsumexp_square_sum.view(1), *own]
    flat = torch.cat(parts)
    return (flat * torch.linspace(0.5, 1.5, flat.shape[0])).sum()
