"""Parameters and floating-point operations of a backbone, counted from its modules; works on the meta
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gatewright.backbones.attention import Attention
from gatewright.backbones.encoder_decoder import EncoderDecoder
from gatewright.backbones.latent import LatentAttention
from gatewright.backbones.lstm import LanguageModel, RecurrentBlock
from gatewright.backbones.lstm_pair import RecurrentEncoderDecoder
from gatewright.backbones.transformer import Block
from gatewright.errors import UserError
from gatewright.parts import Experts, MoELayer, Router
from gatewright.parts.free_experts import FreeExperts
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.parts.rules.hierarchical import HierarchicalRouter

_DRAWS = {nn.init.normal_, nn.init.trunc_normal_, nn.init.uniform_, nn.init.kaiming_uniform_}
_DRAWS |= {Tensor.normal_, Tensor.uniform_}


class _WithoutDraws(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def on_no_memory() -> Iterator[None]:
    """Within it, build models of any size as shapes alone: on the meta device, no weight drawn.

    A draw on the meta device would make torch load its compiler: seconds, for numbers that do not exist.
    Raises: UserError for sizes that no tensor can have.
    """
    try:
        with torch.device("meta"), _WithoutDraws():
            yield
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"no model can have these sizes ({reason}); allowed: smaller ones") from None


@dataclass(frozen=True)
class Cost:
    """What a model weighs and costs.

    `total_parameters`; `active_parameters`: those that one token meets (all but the unchosen experts).
    `flops`: forward floating-point operations per token by part (embedding, attention_projections,
    attention_scores, recurrent, router, experts, shared_experts, dense_ffn, head), a multiply-add counting 2;
    training takes 3 times the forward pass. Blocks that predict further tokens are counted: training computes
    them. Without embedding and head, as the tables of Shazeer et al. 2017 count: `inner_parameters`, and the
    multiply-adds per token `inner_operations`, of a hierarchical router those of the groups that a token
    chooses (`flops` has all, since all are computed here).
    """

    total_parameters: int
    active_parameters: int
    flops: dict[str, float] = field(default_factory=dict)
    inner_parameters: int = 0
    inner_operations: float = 0.0

    @property
    def forward_flops_per_token(self) -> float:
        """Sum of all parts."""
        return sum(self.flops.values())

    @property
    def train_flops_per_token(self) -> float:
        """Forward plus backward: 3 times forward."""
        return 3 * self.forward_flops_per_token


def count_cost(model: nn.Module, context: int) -> Cost:
    """Return the Cost of a Decoder or an LSTMDecoder per token, at sequences of `context` tokens.

    Causal attention meets (context + 1) / 2 keys on average, less within a window; a latent one is counted in
    its full form. Norms, activations, softmax and the optimizer are not counted; what a router multiplies for
    its learned noise in training is. An EncoderDecoder's cost is that of one pair of its own lengths, spread
    over `context` tokens of text.
    """
    if isinstance(model, EncoderDecoder):
        return _pair_cost(model, context)
    if isinstance(model, RecurrentEncoderDecoder):
        return _recurrent_pair_cost(model, context)
    if not isinstance(model, LanguageModel):
        known = "a Decoder, an LSTMDecoder or a model of pairs"
        raise UserError(f"cost of a {type(model).__name__} is not known; allowed: {known}")
    flops = dict.fromkeys(
        (
            "attention_projections",
            "attention_scores",
            "recurrent",
            "router",
            "experts",
            "shared_experts",
            "dense_ffn",
            "head",
        ),
        0.0,
    )
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            flops["attention_projections"] += 2 * sum(p.weight.numel() for p in module.projections)
            flops["attention_scores"] += 2 * module.numbers_per_pair * module.keys_met(context)
        elif isinstance(module, nn.LSTM):
            flops["recurrent"] += 2 * sum(p.numel() for p in module.parameters() if p.dim() > 1)
    further = model.future_blocks
    for block in (layer for layer in (*model.layers, *further) if isinstance(layer, Block | RecurrentBlock)):
        if block.feed_forward is None:
            continue
        own = _feed_forward(block.feed_forward, "dense_ffn")
        idle += sum(p.numel() for p in block.feed_forward.parameters()) - own.active
        for part, count in own.flops.items():
            flops[part] += count
    inner = sum(flops.values()) / 2 - sum(map(_unchosen_groups, model.routers().values()))
    flops["head"] = 2.0 * model.vocab_size * model.width * (1 + len(further))
    if further:
        flops["future"] = 2.0 * len(further) * 2 * model.width**2
    ends = {id(p): p.numel() for p in (model.embedding.weight, model.head.weight)}
    return Cost(
        total_parameters=total,
        active_parameters=round(total - idle),
        flops=flops,
        inner_parameters=total - sum(ends.values()),
        inner_operations=inner,
    )


def _matrices(router: Router) -> float:
    """Return the multiply-adds of a router's linear maps, its noise's included."""
    return float(sum(p.numel() for p in router.parameters() if p.dim() == 2))


def _unchosen_groups(router: Router) -> float:
    """Return the multiply-adds inside groups that a token does not choose."""
    if not isinstance(router, HierarchicalRouter) or router.primary is None:
        return 0.0
    inside = router.weight.numel() * (1 if router.noise is None else 2)
    return inside * (1 - router.num_primary / router.num_groups)


def _pair_cost(model: EncoderDecoder, context: int) -> Cost:
    source, target = model.context, model.target_context
    parts = ("attention_projections", "attention_scores", "router", "experts", "shared_experts", "dense_ffn")
    flops, idle = dict.fromkeys((*parts, "head"), 0.0), 0.0
    # A source token meets all of the source, a target token half of the target on average.
    stacks = ((model.encoder, source, float(source)), (model.decoder, target, (target + 1) / 2))
    for stack, length, keys in stacks:
        for block in stack.blocks():
            own = block.attention
            square, scores = 2.0 * own.query.weight.numel(), 2.0 * 2 * own.num_heads * own.head_dim
            flops["attention_projections"] += 4 * square * length
            flops["attention_scores"] += scores * length * keys
            if block.cross is not None:
                # Queries and outputs of the target, keys and values of the source.
                flops["attention_projections"] += 2 * square * (target + source)
                flops["attention_scores"] += scores * target * source
            share = _feed_forward(block.feed_forward, "dense_ffn")
            idle += sum(p.numel() for p in block.feed_forward.parameters()) - share.active
            for part, count in share.flops.items():
                flops[part] += count * length
    inner = sum(flops.values()) / 2 / context
    flops["head"] = 2.0 * model.vocab_size * model.width * target
    total = sum(p.numel() for p in model.parameters())
    tables = (model.source_embedding.weight, model.target_embedding.weight, model.head.weight)
    ends = {id(p): p.numel() for p in tables}
    each = {part: count / context for part, count in flops.items()}
    return Cost(total, round(total - idle), each, total - sum(ends.values()), inner)


def _recurrent_pair_cost(model: RecurrentEncoderDecoder, context: int) -> Cost:
    """As for an EncoderDecoder; keys of the attention count for the source, all else of it for the target."""
    source, target, bottom = model.context, model.target_context, model.target_bottom
    flops = dict.fromkeys(("recurrent", "router", "experts", "shared_experts", "dense_ffn"), 0.0)
    attention, idle = bottom.attention, 0.0
    flops["attention_projections"] = 2.0 * (attention.u.numel() * source + attention.w.numel() * target)
    flops["attention_scores"] = 2.0 * (len(attention.v) + model.width) * source * target
    pairs: list[tuple[nn.Module, int]] = [(model.source_bottom, source), (bottom.lstm, target)]
    for name, block in model.blocks().items():
        length = source if name.startswith("encoder") else target
        pairs.append((block.lstm, length))
        if block.feed_forward is None:
            continue
        share = _feed_forward(block.feed_forward, "dense_ffn")
        idle += sum(p.numel() for p in block.feed_forward.parameters()) - share.active
        for part, count in share.flops.items():
            flops[part] += count * length
    for module, length in pairs:
        flops["recurrent"] += 2.0 * sum(p.numel() for p in module.parameters() if p.dim() > 1) * length
    inner = sum(flops.values()) / 2 / context
    flops["head"] = 2.0 * model.vocab_size * model.width * target
    total = sum(p.numel() for p in model.parameters())
    ends = model.embedding.weight.numel() + model.head.weight.numel()
    each = {part: count / context for part, count in flops.items()}
    return Cost(total, round(total - idle), each, total - ends, inner)


class _Share(NamedTuple):
    """What one token meets of a module: parameters, and FLOPs by part."""

    active: float
    flops: dict[str, float]

    def times(self, share: float) -> _Share:
        return _Share(share * self.active, {part: share * count for part, count in self.flops.items()})


def _sum(shares: list[_Share]) -> _Share:
    flops: dict[str, float] = {}
    for share in shares:
        for part, count in share.flops.items():
            flops[part] = flops.get(part, 0.0) + count
    return _Share(sum(share.active for share in shares), flops)


def _feed_forward(module: nn.Module, part: str) -> _Share:
    """Return a feed-forward module's share; what is no MoE layer is met whole, and counts as `part`."""
    if not isinstance(module, MoELayer):
        matrices = sum(p.numel() for p in module.parameters() if p.dim() > 1)
        return _Share(sum(p.numel() for p in module.parameters()), {part: 2.0 * matrices})
    router = sum(p.numel() for p in module.router.parameters())
    shares = [_Share(router, {"router": 2.0 * _matrices(module.router)})]
    if module.shared is not None:
        shares.append(_feed_forward(module.shared, "shared_experts"))
    return _sum([*shares, _experts(module.experts, module.num_experts, float(module.num_selected))])


def _experts(experts: nn.Module, num_experts: int, num_selected: float) -> _Share:
    """Return K experts' share. Among free and feed-forward experts, and among modules that differ, it is
    that of an even load.
    """
    if isinstance(experts, FreeExperts):
        chosen = num_selected * experts.num_ffn / experts.num_experts
        own = [p.numel() for p in (experts.w_constant, experts.v_constant) if p is not None]
        free = _Share(sum(own), {"experts": 2.0 * sum(own)})
        return _sum([free, _experts(experts.ffn, experts.num_ffn, chosen)])
    if isinstance(experts, ModuleExperts):
        members = _sum([_feed_forward(member, "experts") for member in experts.members])
        return members.times(num_selected / num_experts)
    parameters = list(experts.parameters())
    matrices = [experts.w_in, experts.w_down] if isinstance(experts, Experts) else parameters
    whole = _Share(sum(p.numel() for p in parameters), {"experts": 2.0 * sum(p.numel() for p in matrices)})
    return whole.times(num_selected / num_experts)
