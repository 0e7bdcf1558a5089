"""What a model of pairs makes of batches of translations: its loss without drops, and the texts it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gatewright.backbones import PairModel
from gatewright.beams import BeamSearch, beam_search
from gatewright.data import Tokenizer
from gatewright.data.parallel import PairBatch
from gatewright.data.translations import Ends
from gatewright.generation import for_generation
from gatewright.parts import MoELayer
from gatewright.training.pairs import held_out_loss


def loss_of(model: PairModel, batches: Sequence[PairBatch]) -> tuple[float, int]:
    """Return nats of all targets' tokens together and their number; no expert drops anything, so that no
    token's loss depends on what stands behind it.
    """
    with for_generation(model, [module for module in model.modules() if isinstance(module, MoELayer)]):
        return held_out_loss(model, batches)


def write_texts(
    model: Any, batches: Sequence[PairBatch], tokenizer: Tokenizer, ends: Ends, search: BeamSearch
) -> list[str]:
    """Return the texts that a model writes for the sources of these batches."""
    texts: list[str] = []
    for batch in batches:
        source, mask = torch.from_numpy(batch.source), torch.from_numpy(batch.source_mask)
        found = beam_search(model, source, start=ends.end, end=ends.end, source_mask=mask, search=search)
        texts += [text_of(tokenizer, best[0].ids) for best in found]
    return texts


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of a target's ids; a tag or a second end inside of it is no text."""
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
