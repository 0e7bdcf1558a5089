"""BASE: in training the best assignment of equal loads to experts, in evaluation the best expert of each."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.parts.groups import group_ids, real_tokens
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, select_top
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.sinkhorn import column_scales

# Of the scores' standard deviation: how soft the choice is that the first prices are found for.
_BLUR = 0.2


def balanced_assignment(scores: Float[Tensor, "T E"]) -> Int64[Tensor, "T"]:
    """Return each token's expert [T], such that the sum of the scores taken is the greatest possible with
    floor(T/E) or ceil(T/E) tokens for every expert.

    Where T is no multiple of E, the T mod E experts with one more are those that gain most. Exact, up to
    rounding in fp64: tokens are placed one by one along the path, through the experts, on which the others
    move aside at the least cost (successive shortest paths; no residual path costs less than nothing).
    Scores that are not finite count as the smallest finite one. Slow where loads are uneven: about 0.3 ms
    for each token beyond an expert's share.
    """
    gains = scores.detach().to("cpu", torch.float64)
    finite = gains.isfinite()
    gains = torch.where(finite, gains, gains[finite].min() if bool(finite.any()) else 0)
    num_tokens, num_experts = gains.shape
    floor, ceiling = num_tokens // num_experts, -(-num_tokens // num_experts)
    taken, order = _first_come(gains - _prices(gains), floor)
    loads = torch.bincount(taken[taken >= 0], minlength=num_experts)
    # moves[j, i]: the least that one of i's tokens loses by moving to j, and that token.
    moves = torch.full((num_experts, num_experts), math.inf, dtype=torch.float64)
    movers = torch.zeros(num_experts, num_experts, dtype=torch.int64)
    for expert in range(num_experts):
        _refresh(expert, taken, gains, moves, movers)
    spread = float(gains.max() - gains.min()) if num_tokens else 0.0
    for token in order.tolist():
        costs, before = _cheapest(-gains[token], moves, 1e-13 * spread)
        # A place below the floor comes before any place above it, at whatever cost.
        room = loads < (floor if bool((loads < floor).any()) else ceiling)
        end = int(torch.where(room, costs, math.inf).argmin())
        loads[end] += 1
        path = [end]
        while int(before[path[-1]]) >= 0:
            path.append(int(before[path[-1]]))
        for to, source in pairwise(path):
            taken[movers[to, source]] = to
        taken[token] = path[-1]
        for expert in path:
            _refresh(expert, taken, gains, moves, movers)
    return taken.to(scores.device)


def _prices(gains: Tensor) -> Tensor:
    """Return prices [E] at which the tokens' best experts are nearly balanced: a head start, no more."""
    width = float(gains.std()) * _BLUR if gains.numel() > 1 else 0.0
    if not width > 0:
        return gains.new_zeros(gains.shape[1])
    scales, _ = column_scales(gains / width, RoutingCall(), 1e-2, 20)
    return -width * scales.squeeze(0).log()


def _first_come(gains: Tensor, floor: int) -> tuple[Tensor, Tensor]:
    """Return the experts of the tokens that fit at their best, -1 for the others, and the ids of those.

    Those with most to lose against their second best come first: they are the least likely to move again.
    """
    num_tokens, num_experts = gains.shape
    best = gains.argmax(dim=1) if num_tokens else torch.zeros(0, dtype=torch.int64)
    if num_experts > 1 and num_tokens:
        two = torch.topk(gains, 2, dim=1).values
        order = torch.sort(two[:, 1] - two[:, 0], stable=True).indices
    else:
        order = torch.arange(num_tokens)
    keys, queue = torch.sort(best[order], stable=True)
    held = torch.bincount(best, minlength=num_experts)
    ranks = torch.arange(num_tokens) - (held.cumsum(0) - held)[keys]
    placed, left = order[queue[ranks < floor]], order[queue[ranks >= floor]]
    taken = torch.full((num_tokens,), -1, dtype=torch.int64)
    taken[placed] = best[placed]
    return taken, left


def _refresh(expert: int, taken: Tensor, gains: Tensor, moves: Tensor, movers: Tensor) -> None:
    """Rewrite the moves away from one expert, after its tokens have changed."""
    own = (taken == expert).nonzero().squeeze(-1)
    if own.shape[0]:
        least, which = (gains[own, expert].unsqueeze(-1) - gains[own]).min(dim=0)
        moves[:, expert], movers[:, expert] = least, own[which]
    else:
        moves[:, expert] = math.inf
    moves[expert, expert] = math.inf


def _cheapest(direct: Tensor, moves: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return what it costs to bring a token in so that the load of each expert grows by one, [E], and the
    expert before it on that path, -1 for none (Bellman-Ford over experts).
    """
    costs, before = direct.clone(), torch.full(direct.shape, -1, dtype=torch.int64)
    for _ in range(direct.shape[0]):
        least, source = (costs + moves).min(dim=1)
        better = least < costs - tolerance
        if not bool(better.any()):
            break
        costs = torch.where(better, least, costs)
        before = torch.where(better, source, before)
    return costs, before


class Base:
    """One expert per token; in training all loads of a routing group are equal and the sum of logits is the
    greatest possible, in evaluation each token takes its best expert.

    Equation: BASE (Lewis et al. 2021), eq 2: maximise sum_t h_t . w_{a_t} with T/E tokens per expert; eq 1:
    y_t = h_t + sigmoid(h_t . w_{a_t}) f_{a_t}(h_t). The weight is that sigmoid, the only way for gradient to
    the router; "h +" is the residual of the block around this layer. The best balance looks at later tokens,
    so that the paper too takes the argmax at test time.
    Args: none. T no multiple of E: loads are floor(T/E) or ceil(T/E); padding takes no place.
    Differs: the paper solves by an auction, which fairseq's code stops after 100 rounds at near the best;
    this is exact. fairseq balances where the input requires gradient; here `training` decides. Tokens are
    not shuffled over workers: a routing group is balanced by itself.
    Eager only in training: `torch.compile` breaks the graph here. Slow: about 1 s for 16,384 tokens and 64
    experts on one CPU core, more than 10 times all else that a router does.
    """

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        experts = _balanced(logits, call) if call.training else select_top(logits, 1)
        if call.mask is not None:
            experts = torch.where(call.mask.unsqueeze(-1), experts, -1)
        return Assignment(experts, scores.gather(-1, experts.clamp(min=0)), scores.shape[-1])


@torch.compiler.disable
def _balanced(logits: Float[Tensor, "T E"], call: RoutingCall) -> Int64[Tensor, "T 1"]:
    """Return the balanced choice [T, 1], group by group, -1 for padding."""
    num_tokens = logits.shape[0]
    real = real_tokens(call.mask, num_tokens, logits.device)
    groups = torch.where(real, group_ids(num_tokens, call.group_size, logits.device), -1)
    experts = torch.full((num_tokens,), -1, dtype=torch.int64, device=logits.device)
    for group in groups.unique().tolist():
        if group >= 0:
            own = groups == group
            experts[own] = balanced_assignment(logits[own])
    return experts.unsqueeze(-1)


def _make(width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32) -> Router:
    check_selection(num_experts, num_selected, "raw")
    return Router(width, num_experts, dtype, rule=Base(), scores="sigmoid")


register(
    RouterInfo(
        name="base",
        scores="sigmoid",
        selection="training: the best assignment of equal loads; evaluation: each token its best expert",
        weights="raw scores",
        capacity="exactly full by construction (training)",
        losses=(),
        causal=False,
        causal_in_eval=True,
        used_by="BASE Layers",
        source="Lewis et al. 2021 eq 1-2",
        make=_make,
        fixed_selected=1,
    )
)
