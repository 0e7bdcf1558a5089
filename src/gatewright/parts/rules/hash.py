"""Hash layers: the token's id, and nothing else, says which experts it uses."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError, did_you_mean
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection
from gatewright.parts.rules.registry import RouterInfo, register

HASH_WEIGHTS = ("uniform", "learned")

# Sums of scores below this are taken for it: scores that all underflow weigh 0, not NaN.
_LEAST_SUM = 1e-20


def hash_table(
    vocab_size: int,
    num_experts: int,
    num_selected: int,
    frequencies: Sequence[int | float] | None = None,
    seed: int = 0,
) -> Int64[Tensor, "V K"]:
    """Return which K distinct experts each token id uses, [V, K] int64.

    Equation: Hash Layers section 3.1, "balanced": tokens by falling frequency in the corpus, the lowest id
    first among equals, each put on the currently lightest experts (K of them here, each taking the token's
    whole frequency); among equally heavy experts, those that hold fewer ids, then the lowest id. Without
    `frequencies`: tokens in random order, each on the K experts that hold the fewest ids, random among
    equals, so that experts hold equally many ids, give or take one; pure Python draws from `seed`, the same
    everywhere.
    Args: `frequencies` V counts or shares, 0 or more. No expert can be lighter than its most frequent token.
    Raises: UserError for sizes below 1, K outside 1..E, frequencies of another number, or negative ones.
    """
    if vocab_size < 1:
        raise UserError(f"vocab_size {vocab_size}; allowed: 1 or more; give the tokenizer's number of ids")
    check_selection(num_experts, num_selected, "raw")
    draw = random.Random(seed)
    weights: list[float] = [1] * vocab_size if frequencies is None else list(frequencies)
    if len(weights) != vocab_size:
        raise UserError(
            f"{len(weights)} frequencies with vocab_size {vocab_size}; allowed: {vocab_size}; give one per "
            "token id"
        )
    if not all(0 <= weight < math.inf for weight in weights):
        raise UserError("a frequency below 0 or not finite; allowed: 0 or more; count tokens in a corpus")
    falling = [(-weight, draw.random() if frequencies is None else 0.0) for weight in weights]
    table = [[0] * num_selected] * vocab_size
    experts = [(0.0, 0, 0.0, e) for e in range(num_experts)]
    if frequencies is None:
        experts = [(0.0, 0, draw.random(), e) for e in range(num_experts)]
    heapq.heapify(experts)
    for token in sorted(range(vocab_size), key=falling.__getitem__):
        lightest = [heapq.heappop(experts) for _ in range(num_selected)]
        table[token] = [e for *_, e in lightest]
        for load, held, order, e in lightest:
            order = draw.random() if frequencies is None else order
            heapq.heappush(experts, (load + weights[token], held + 1, order, e))
    return torch.tensor(table, dtype=torch.int64)


class HashRule(nn.Module):
    """Each token goes to the experts that a fixed table holds for its id.

    Equation: Hash Layers: h_t = FFN_{hash(x_t)}(h_t), without a gate ("uniform": weight 1, for K > 1
    each 1 / K); released inference code of DeepSeek-V4 ("learned"): the table says which, a learned gate how
    much, w = scale * s[idx] / sum s[idx].
    Args: `table` [V, K] int64, K distinct experts per row; it is a persistent buffer, so a checkpoint
    carries it (it goes with one tokenizer). `scale` multiplies learned weights (DeepSeek-V4: 1.5); uniform
    ones have none.
    Raises: UserError for a table that is not one, an unknown weight form, a scale that is not above 0,
    learned weights with K = 1 < E (a constant gate); and in a call, without token ids and (eager only) for
    ids of real tokens that stand outside the table.
    """

    table: Tensor

    def __init__(
        self, table: Int64[Tensor, "V K"], num_experts: int, weights: str = "uniform", scale: float = 1.0
    ) -> None:
        super().__init__()
        if weights not in HASH_WEIGHTS:
            raise UserError(
                f"weights {weights!r} is unknown{did_you_mean(weights, HASH_WEIGHTS)}; allowed: "
                f"{', '.join(HASH_WEIGHTS)}"
            )
        if not scale > 0 or (weights == "uniform" and scale != 1):
            raise UserError(
                f"scale {scale} with weights {weights!r}; allowed: above 0; uniform weights have none: leave "
                "it 1"
            )
        check_selection(num_experts, table.shape[1], "renormalised" if weights == "learned" else "raw")
        if not table.is_meta:
            _check_table(table, num_experts)
        self.num_experts, self.num_selected = num_experts, table.shape[1]
        self.weights, self.scale = weights, scale
        self.register_buffer("table", table)

    def forward(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where; uniform weights carry no gradient."""
        ids = call.token_ids
        if ids is None:
            raise UserError(
                "a hash router got no token_ids; allowed: one id per token; call the layer with token_ids=..."
            )
        if call.mask is not None:
            ids = torch.where(call.mask, ids, 0)
        if not torch.compiler.is_compiling() and ids.numel():
            least, most = torch.stack(ids.aminmax()).tolist()
            if least < 0 or most >= self.table.shape[0]:
                raise UserError(
                    f"token ids {least} to {most} in a hash table of {self.table.shape[0]}; allowed: 0 to "
                    f"{self.table.shape[0] - 1}; build the router with the tokenizer's vocab_size"
                )
        experts = self.table[ids]
        if self.weights == "uniform":
            weights = scores.new_full(experts.shape, 1 / self.num_selected)
        else:
            weights = scores.gather(-1, experts)
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=_LEAST_SUM) * self.scale
        if call.mask is not None:
            experts = torch.where(call.mask.unsqueeze(-1), experts, -1)
        return Assignment(experts, weights, self.num_experts)


class HashRouter(Router):
    """A router without parameters: its logits are 0, so its scores are 1 / E each and teach nothing.

    `weight` is an empty buffer [E, 0]: whoever counts or casts a router's weight finds none.
    """

    weight: Tensor  # type: ignore[assignment]

    def __init__(self, num_experts: int, rule: HashRule, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(0, num_experts, dtype, rule=rule)
        del self.weight
        self.register_buffer("weight", torch.empty(num_experts, 0), persistent=False)

    def reset_parameters(self, std: float | None = None) -> None:
        """Do nothing: there are none."""

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return logits [T, E] of 0, in `dtype` (float64 for float64 input)."""
        wide = torch.float64 if x.dtype == torch.float64 else self.dtype
        return x.new_zeros((x.shape[0], self.weight.shape[0]), dtype=wide)


def _check_table(table: Tensor, num_experts: int) -> None:
    if table.shape[0] < 1 or int(table.min()) < 0 or int(table.max()) >= num_experts:
        raise UserError(
            f"a hash table with entries outside 0 to {num_experts - 1}, or without rows; allowed: ids of "
            f"{num_experts} experts, K per token id"
        )
    ordered = table.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise UserError(
            "a hash table that names an expert twice in a row; allowed: K distinct experts per token id"
        )


def make_hash(
    width: int,
    num_experts: int,
    num_selected: int,
    dtype: torch.dtype = torch.float32,
    *,
    vocab_size: int = 257,
    frequencies: Sequence[int | float] | None = None,
    seed: int = 0,
    table: Int64[Tensor, "V K"] | None = None,
    weights: str = "uniform",
    scale: float = 1.0,
) -> Router:
    """Return a router that looks at token ids only, or (weights "learned") weighs by a gate what the ids
    chose.

    Args: `vocab_size` V, by default that of the byte tokenizer; `frequencies` and `seed` as in `hash_table`;
    `table` [V, K] replaces all three.
    """
    if table is None:
        table = hash_table(vocab_size, num_experts, num_selected, frequencies, seed)
    elif table.shape[1] != num_selected:
        raise UserError(
            f"a hash table of {table.shape[1]} experts per token with num_selected {num_selected}; allowed: "
            "as many columns as experts per token"
        )
    rule = HashRule(table, num_experts, weights, scale)
    if weights == "uniform":
        return HashRouter(num_experts, rule, dtype)
    return Router(width, num_experts, dtype, rule=rule, scores="sqrt_softplus")


register(
    RouterInfo(
        name="hash",
        scores="none; with weights 'learned', sqrt(softplus)",
        selection="a fixed table from token ids to K experts each",
        weights="1 / K, or learned scores renormalised over the chosen",
        capacity="none",
        losses=(),
        causal=True,
        used_by="Hash Layers; first layers of DeepSeek-V4 (learned weights)",
        source="Roller et al. 2021 (arXiv 2106.04426)",
        make=make_hash,
        needs_token_ids=True,
    )
)
