"""How a decoder's weights are named in a released checkpoint: views of our tensors, which serve both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.conversion.families import Family


class Piece(NamedTuple):
    """A tensor of a released checkpoint: its name and shape, and the views of our weights that it is; two of
    them stand side by side, along the second axis. `copy`: the checkpoint repeats what it holds elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    views: tuple[Tensor, ...]
    copy: bool = False

    def read(self) -> Tensor:
        """Return the tensor as the checkpoint has it."""
        parts = [view.detach() for view in self.views]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return whole.reshape(self.shape).contiguous()

    @torch.no_grad()
    def write(self, given: Tensor) -> None:
        """Copy the checkpoint's tensor into our weights."""
        parts = (given,) if len(self.views) == 1 else given.split([v.shape[1] for v in self.views], dim=1)
        for view, part in zip(self.views, parts, strict=True):
            view.copy_(part.reshape(view.shape))


_NAMES = {
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
}  # fmt: skip
_LATENT = _NAMES | {
    "attention.query_down": "self_attn.q_a_proj", "attention.query_norm": "self_attn.q_a_layernorm",
    "attention.query": "self_attn.q_b_proj", "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm", "attention.kv_up": "self_attn.kv_b_proj",
}  # fmt: skip
_FURTHER = {"state_norm": "hnorm", "token_norm": "enorm", "norm": "shared_head.norm"}


def pieces(model: Decoder, family: Family) -> Iterator[Piece]:
    """Yield every tensor that a released checkpoint of the model has, layer by layer. Of a model on the meta
    device, names and shapes are what counts.
    """
    yield _one("model.embed_tokens.weight", model.embedding.weight)
    for i, block in enumerate(model.layers):
        yield from block_pieces(f"model.layers.{i}.", block.state_dict(keep_vars=True), family)
    yield _one("model.norm.weight", model.norm.weight)
    if not model.tie_embeddings:
        yield _one("lm_head.weight", model.head.weight)
    for i, further in enumerate(model.future):
        place = f"model.layers.{len(model.layers) + i}."
        held = further.state_dict(keep_vars=True)
        inner = {n.removeprefix("block."): held.pop(n) for n in list(held) if n.startswith("block.")}
        yield from block_pieces(place, inner, family)
        states, tokens = held.pop("join.weight").chunk(2, dim=1)
        # Theirs takes the embedding first.
        yield Piece(f"{place}eh_proj.weight", (states.shape[0], 2 * states.shape[1]), (tokens, states))
        for name, value in held.items():
            stem, _, end = name.rpartition(".")
            yield _one(f"{place}{_FURTHER[stem]}.{end}", value)
        yield _one(f"{place}embed_tokens.weight", model.embedding.weight, copy=True)
        yield _one(f"{place}shared_head.head.weight", model.head.weight, copy=True)


def _one(name: str, value: Tensor, copy: bool = False) -> Piece:
    return Piece(name, tuple(value.shape), (value.detach(),), copy)


def block_pieces(place: str, held: dict[str, Tensor], family: Family) -> Iterator[Piece]:
    """Yield the tensors of one layer, whose names begin with `place`; `held` is its state_dict."""
    latent = "attention.kv_up.weight" in held
    names = _LATENT if latent else _NAMES
    if latent and "attention.query_down.weight" not in held:
        names = names | {"attention.query": "self_attn.q_proj"}
    sparse = any(name.startswith("feed_forward.router.") for name in held)
    # Mixtral's experts have a block of their own name, a dense layer has everyone's.
    block = family.block if sparse or family.block == "feed_forward" else "mlp"
    for name, value in held.items():
        if name.startswith("feed_forward."):
            rest = name.removeprefix("feed_forward.")
            yield from _feed_forward(f"{place}{block}.", rest, value.detach(), family)
        elif name == "attention.sinks":
            yield _one(f"{place}self_attn.sinks", value)
        else:
            stem, _, end = name.rpartition(".")
            yield _one(f"{place}{names[stem]}.{end}", value)


def _feed_forward(place: str, rest: str, value: Tensor, family: Family) -> Iterator[Piece]:
    if rest == "router.rule.bias.bias":
        yield _one(f"{place}{family.router}.e_score_correction_bias", value)
    elif rest.startswith("router.rule."):
        return  # how often the bias was moved, which no checkpoint of theirs knows
    elif rest.startswith("router."):
        yield _one(f"{place}{family.router}.{rest.removeprefix('router.')}", value)
    elif rest.startswith("experts."):
        kind = rest.removeprefix("experts.")
        yield from (_stacked if family.stacked else _experts)(f"{place}experts.", kind, value, family)
    elif rest == "shared.gate":
        yield _one(f"{place}shared_expert_gate.weight", value)
    else:
        if rest.startswith("shared."):
            place += f"{family.shared}."
        if rest.endswith("w_in"):
            for part, half in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                yield _one(f"{place}{part}.weight", half)
        else:
            yield _one(f"{place}down_proj.weight", value)


def _experts(place: str, kind: str, value: Tensor, family: Family) -> Iterator[Piece]:
    """Yield each expert's matrices of w_gate_up [E, 2F, D] or w_down [E, D, F]."""
    gate, up, down = family.parts
    for e, one in enumerate(value):
        named = zip((gate, up), one.chunk(2), strict=True) if kind == "w_gate_up" else ((down, one),)
        for part, matrix in named:
            yield _one(f"{place}{e}.{part}.weight", matrix)


def _stacked(place: str, kind: str, value: Tensor, family: Family) -> Iterator[Piece]:
    """Yield the one tensor that a layer's experts are: [E, D, 2F] or [E, F, D], and biases."""
    first = kind.endswith("gate_up")
    name = f"{place}{'gate_up_proj' if first else 'down_proj'}{'_bias' if kind.startswith('b_') else ''}"
    view = value
    if first and family.stacked == "interleaved":
        view = value.unflatten(1, (2, value.shape[1] // 2))
        view = view.mT if view.dim() == 3 else view.permute(0, 3, 2, 1)
    elif value.dim() == 3:
        view = value.mT
    shape = tuple(value.mT.shape) if value.dim() == 3 else tuple(value.shape)
    yield Piece(name, shape, (view,))
