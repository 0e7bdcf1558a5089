"""The sides of a decoding race: our decoder, the same with int8 experts, and transformers' on our weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.conversion import quantise_experts
from gatewright.conversion.decoding import TransformersDecoder
from gatewright.measuring.rounds import Turn

OURS, INT8 = "ours", "ours_int8"
EAGER, GROUPED, COMPILED = "transformers_eager", "transformers_grouped_mm", "transformers_compiled"
THEIRS = (EAGER, GROUPED, COMPILED)
# What a compiled side may take before its first step; longer, and it is left out.
LONGEST_COMPILATION = 120.0


class Decodes(Protocol):
    """What a side does: see TransformersDecoder."""

    def begin(self, prompts: Tensor) -> Tensor:
        """Return logits [B, V] after prompts [B, S]."""

    def step(self, ids: Tensor) -> Tensor:
        """Return logits [B, V] after one more id per row [B, 1]."""

    def rewind(self) -> None:
        """Return to the end of the prompts."""


class OurDecoder:
    """Our decoder and its cache."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self.decoder, self.capacity, self.length = decoder, capacity, 0
        self.cache: Any = None

    def begin(self, prompts: Tensor) -> Tensor:
        """Return the logits after `prompts` [B, S], which a new cache then holds."""
        self.cache, self.length = self.decoder.new_cache(prompts.shape[0], self.capacity), prompts.shape[1]
        return self.step(prompts)

    def step(self, ids: Tensor) -> Tensor:
        """Return the logits after more ids."""
        return self.decoder(ids, self.cache, with_stats=False, only_last=True).logits[:, -1]

    def rewind(self) -> None:
        """Return to the end of the prompts."""
        for layer in self.cache.layers:
            layer.length = self.length


def in_int8(decoder: Decoder) -> Decoder:
    """Return the decoder with its experts in int8, sharing every other weight."""
    memo: dict[int, Any] = {id(weight): weight for weight in decoder.parameters()}
    other = copy.deepcopy(decoder, memo)
    quantise_experts(other)
    return other


def make_side(name: str, decoder: Decoder, capacity: int) -> Decodes:
    """Return a side by its name."""
    if name == OURS:
        return OurDecoder(decoder, capacity)
    if name == INT8:
        return OurDecoder(in_int8(decoder), capacity)
    implementation = "eager" if name == EAGER else "grouped_mm"
    return TransformersDecoder(decoder, implementation, capacity, compiled=name == COMPILED)


@dataclass(frozen=True)
class Continued:
    """Greedy ids [B, N] behind the prompts, and how far the chosen logit of each stood above the next one,
    over the largest magnitude among the logits.
    """

    ids: Tensor
    lead: Tensor


@torch.inference_mode()
def continue_greedily(side: Decodes, first: Tensor, count: int) -> Continued:
    """Return `count` ids that follow the logits [B, V] after the prompts; the cache is where it was, then."""
    logits, ids, lead = first, [], []
    for number in range(count):
        top = logits.float().topk(2, dim=-1).values
        lead.append((top[:, 0] - top[:, 1]) / logits.float().abs().amax(dim=-1))
        ids.append(logits.argmax(dim=-1, keepdim=True))
        if number + 1 < count:
            logits = side.step(ids[-1])
    side.rewind()
    return Continued(torch.cat(ids, dim=1), torch.stack(lead, dim=1))


def decoding_turn(side: Decodes, first: Tensor, count: int) -> Turn:
    """Return a turn of `count` greedy steps, each fed with what the one before chose."""

    @torch.inference_mode()
    def run() -> None:
        logits = first
        for _ in range(count):
            logits = side.step(logits.argmax(dim=-1, keepdim=True))

    return Turn(run, side.rewind)


def prefill_turn(side: Decodes, prompts: Tensor) -> Turn:
    """Return a turn that reads prompts into a new cache."""

    @torch.inference_mode()
    def run() -> None:
        side.begin(prompts)

    return Turn(run, lambda: None)


def compile_steps(side: Decodes, first: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a side's first two steps take: what compiling costs."""
    started = clock()
    continue_greedily(side, first, 3)
    return clock() - started


def first_difference(ours: Continued, theirs: Continued) -> list[tuple[int, float]]:
    """Return for each row in which the ids differ the first such place, and our lead there: 0 is a tie."""
    found = []
    for row in range(ours.ids.shape[0]):
        places = (ours.ids[row] != theirs.ids[row]).nonzero()
        if len(places):
            place = int(places[0])
            found.append((place, float(ours.lead[row, place])))
    return found


@torch.inference_mode()
def weight_bytes_per_step(decoder: Decoder, prompts: Tensor, ids: Tensor) -> float:
    """Return the bytes of weights that a step over `ids` [B, N] reads, on average: every matrix once, and of
    the experts those that one of the B tokens chose, as counted from the routing.
    """
    cache = decoder.new_cache(prompts.shape[0], prompts.shape[1] + ids.shape[1])
    decoder(prompts, cache)
    blocks: list[Any] = list(decoder.layers)
    experts = sum(_expert_bytes(block.feed_forward) for block in blocks)
    held = sum(one.nbytes for one in (*decoder.parameters(), *decoder.buffers()))
    embedding = decoder.embedding.weight
    fixed = held - experts - embedding.nbytes + ids.shape[0] * embedding[0].nbytes
    read = 0.0
    for place in range(ids.shape[1]):
        stats = decoder(ids[:, place : place + 1], cache).stats
        for number, block in enumerate(blocks):
            counts = stats[f"layers.{number}.router"].counts
            read += _expert_bytes(block.feed_forward) * int((counts > 0).sum()) / len(counts)
    return fixed + read / ids.shape[1]


def _expert_bytes(layer: Any) -> int:
    return sum(one.nbytes for one in (*layer.experts.parameters(), *layer.experts.buffers()))
