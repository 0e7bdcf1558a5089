"""Experts that are modules of their own, MoE layers among them: a mixture of mixtures."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import DispatchPlan
from gatewright.kernels.padded import combine_places, layout, spread
from gatewright.kernels.reference import by_row, combine
from gatewright.parts.draws import fold
from gatewright.parts.layer import MoELayer
from gatewright.parts.router import Router
from gatewright.parts.stats import Stats

# Each inner layer's noise comes of a key of its own.
_INNER = 0x696E6E72


class ModuleExperts(nn.Module):
    """One module per expert, each [M, D] -> [M, D], or -> (y, Stats) as a `MoELayer` returns.

    A module is given its expert's rows in position order, all of a call at once, and treats every row by
    itself; one without rows is given none, so that its Stats and gradients exist. Inner statistics are
    returned under "experts.i". The modules run one after another, so this is for few and large experts;
    `backend` says nothing here. Compiled code hands each module its C places, filled or not, and an inner
    MoELayer a mask with them.
    Raises: UserError without modules.
    """

    takes_key = True

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)
        if not len(self.members):
            raise UserError("0 modules as experts; allowed: 1 or more")

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.members)

    def routers(self) -> dict[str, Router]:
        """Return the routers of all inner layers, as Stats names them."""
        layers = [(i, m) for i, m in enumerate(self.members) if isinstance(m, MoELayer)]
        return {f"experts.{i}.{name}": one for i, m in layers for name, one in m.routers().items()}

    def forward(
        self,
        x: Float[Tensor, "T D"],
        plan: DispatchPlan,
        combine_weights: Float[Tensor, "T K"],
        backend: str | None = None,
        *,
        key: Int64[Tensor, ""] | None = None,
    ) -> tuple[Float[Tensor, "T D"], Stats]:
        """Return (y [T, D], Stats of inner layers): each token's experts, combined with its weights."""
        if plan.num_experts != self.num_experts:
            raise UserError(
                f"a plan for {plan.num_experts} experts, {self.num_experts} modules; allowed: as many of each"
            )
        rows = x.index_select(0, plan.token_ids)
        if plan.weight_side == "input":
            wide = torch.promote_types(x.dtype, torch.float32)
            rows = (rows.to(wide) * by_row(combine_weights.to(wide), plan).unsqueeze(-1)).to(x.dtype)
            combine_weights = torch.ones_like(combine_weights)
        if torch.compiler.is_compiling():
            return self._at_places(rows, plan, combine_weights, key)
        counts = plan.counts.tolist()
        behind = rows.shape[0] - sum(counts)
        out, stats = [], Stats()
        for i, block in enumerate(rows.split([*counts, behind])[:-1]):
            y, inner = self._member(i, block, None, key)
            out.append(y)
            stats = stats | inner.under(f"experts.{i}")
        return combine(torch.cat([*out, rows.new_zeros(behind, x.shape[1])]), plan, combine_weights), stats

    def _at_places(
        self, rows: Tensor, plan: DispatchPlan, combine_weights: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Stats]:
        """Return the same over [E, C, D], so that no shape depends on the numbers."""
        where = layout(plan)
        blocks = spread(rows, where)
        out, stats = [], Stats()
        for i in range(self.num_experts):
            y, inner = self._member(i, blocks[i], where.filled[i], key)
            out.append(y)
            stats = stats | inner.under(f"experts.{i}")
        return combine_places(torch.stack(out), where, combine_weights), stats

    def _member(
        self, i: int, rows: Tensor, filled: Tensor | None, key: Tensor | None
    ) -> tuple[Tensor, Stats]:
        module = self.members[i]
        if isinstance(module, MoELayer):
            found = module(rows, filled, key=None if key is None else fold(key, _INNER, i))
        else:
            found = module(rows)
        return found if isinstance(found, tuple) else (found, Stats())
