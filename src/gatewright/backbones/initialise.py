"""Weight initialisation by the papers' rules, applied to a whole backbone."""

from __future__ import annotations

from torch import Tensor, nn

from gatewright.backbones.norm import RMSNorm
from gatewright.errors import UserError
from gatewright.parts import Experts, Router


def _matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the weights that are drawn: norms, biases and what routers hold beside their weight stay as
    their modules made them (noise starts at 0, temperatures and thresholds at values of their own).
    """
    left = {id(m.weight) for m in model.modules() if isinstance(m, RMSNorm)}
    for router in (m for m in model.modules() if isinstance(m, Router)):
        kept = router.keeps_initialisation
        left |= {id(p) for name, p in router.named_parameters() if kept or name != "weight"}
    for experts in (m for m in model.modules() if isinstance(m, Experts)):
        left |= {id(bias) for bias in (experts.b_in, experts.b_down)}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in left and p.dim() > 1]


def normal(model: nn.Module, std: float = 0.02, cut: float = 3.0) -> nn.Module:
    """Draw every matrix from a normal of `std`, truncated at `cut` std (OLMoE table 10: 0.02, cut at 3);
    norms are 1.
    """
    for _, weight in _matrices(model):
        nn.init.trunc_normal_(weight, std=std, a=-cut * std, b=cut * std)
    return model


def fan_in(
    model: nn.Module, scale: float = 1.0, embedding_std: float = 1.0, router_std: float | None = None
) -> nn.Module:
    """Draw every matrix from a normal of std sqrt(scale / fan_in), truncated at 2 std (Switch section 2.4:
    scale 0.1 for 1.0).

    Embeddings take `embedding_std`; routers take `router_std` where given.
    """
    if not scale > 0:
        raise UserError(f"init_scale {scale}; allowed: above 0; it is a share of the usual variance")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, weight in _matrices(model):
        if id(weight) in embeddings:
            std = embedding_std
        elif router_std is not None and name.endswith("router.weight"):
            std = router_std
        else:
            std = (scale / weight.shape[-1]) ** 0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    return model
