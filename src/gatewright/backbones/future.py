"""Multi-token prediction: a further block that predicts the token behind the next one."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.backbones.attention import LayerCache
from gatewright.backbones.norm import RMSNorm
from gatewright.kernels import apply_linears
from gatewright.parts import Stats


class FutureToken(nn.Module):
    """One depth of multi-token prediction: states of the depth before and the embeddings of the next tokens,
    both [B, S, D] -> states [B, S, D], ready for the output head, and Stats.

    Equation (DeepSeek-V3 eq 21-23): h'_i = M [norm(h_i); norm(Emb(t_{i+k}))], h = norm(block(h')); embedding
    and output head are the main model's.
    Differs: the paper prints neither the last norm nor whether h of depth 0 is normed; both are as in the
    released weights and the code that runs them. There M takes the embedding first: its halves are swapped.
    """

    def __init__(self, width: int, block: nn.Module, norm_eps: float) -> None:
        super().__init__()
        self.state_norm = RMSNorm(width, norm_eps)
        self.token_norm = RMSNorm(width, norm_eps)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.block = block
        self.norm = RMSNorm(width, norm_eps)

    def forward(
        self,
        states: Float[Tensor, "B S D"],
        embedded: Float[Tensor, "B S D"],
        cos: Float[Tensor, "S rotary"],
        sin: Float[Tensor, "S rotary"],
        cache: LayerCache | None = None,
        key: Int64[Tensor, ""] | None = None,
        token_ids: Int64[Tensor, "B S"] | None = None,
        with_stats: bool = True,
    ) -> tuple[Float[Tensor, "B S D"], Stats]:
        """Return the states of this depth and the Stats of its block's router."""
        both = torch.cat([self.state_norm(states), self.token_norm(embedded)], dim=-1)
        (joined,) = apply_linears(both, (self.join,))
        x, stats = self.block(joined, cos, sin, cache, False, key, token_ids, with_stats)
        return self.norm(x), stats
