"""Continue a text with a decoder: greedy or sampled, with a key-value cache, one id at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gatewright.backbones import LanguageModel
from gatewright.errors import RunFailure, UserError
from gatewright.generation.reader import Reader
from gatewright.generation.sampling import Sampling, draw, next_probabilities


def generate(
    model: LanguageModel,
    tokens: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Iterable[int] = (),
    cache: bool = True,
    ahead: bool = False,
) -> list[int] | list[list[int]]:
    """Return the ids that follow `tokens`, without the stop id: a list, or one list per row of a [B, S]
    tensor.

    Args: as `stream`. Row r of a batch draws from its own random numbers (seed, r), and ends by itself.
    """
    prompts, one = check_tokens(model, tokens)
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    capacity = prompts.shape[1] + check_count(max_new_tokens)
    reader = Reader(model, prompts.shape[0], capacity, use_cache=cache, ahead=ahead)
    out: list[list[int]] = [[] for _ in range(prompts.shape[0])]
    for ids in steps(reader, prompts, max_new_tokens, sampling, check_stop(model, stop)):
        for row, new in zip(out, ids, strict=True):
            if new is not None:
                row.append(new)
    return out[0] if one else out


def stream(
    model: LanguageModel,
    tokens: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Iterable[int] = (),
    cache: bool = True,
    ahead: bool = False,
) -> Iterator[int]:
    """Return an iterator over the ids that follow one text, each as soon as it is drawn.

    Args: `tokens` are the prompt's ids, one or more; `max_new_tokens` >= 0; `temperature` >= 0, where 0 takes
    the likeliest id (the lowest of equals); `top_p` in (0, 1] keeps the smallest set of likeliest ids whose
    probability reaches it, among the `top_k` likeliest; `min_p` in [0, 1] keeps ids at least that share as
    likely as the likeliest; `repetition_penalty` > 1 makes ids that the text holds, its prompt included, less
    likely; the same `seed` draws the same ids and no global random state is read or changed; generation ends
    before an id of `stop` (end of text) or after `max_new_tokens`; `cache` False reads the whole text anew
    for each id; `ahead` lets the model's further block (DeepSeek-V3) guess an id, for the same ids in fewer
    passes, of one text.
    A text that outgrows the model's context goes on from its last context // 2 ids, which are read anew, with
    or without cache. Experts with a capacity drop nothing here: a lone token has no batch to be even with.
    Raises: UserError at the call for an argument out of range; RunFailure where the model's logits are not
    finite.
    """
    prompts, one = check_tokens(model, tokens)
    if not one:
        raise UserError("tokens of shape [B, S] in stream; allowed: one text; use generate for a batch")
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    reader = Reader(model, 1, prompts.shape[1] + check_count(max_new_tokens), use_cache=cache, ahead=ahead)
    drawn = steps(reader, prompts, max_new_tokens, sampling, check_stop(model, stop))
    return (ids[0] for ids in drawn if ids[0] is not None)


def steps(
    reader: Reader,
    text: Tensor,
    count: int,
    sampling: Sampling,
    stop: frozenset[int],
    first_row: int = 0,
) -> Iterator[list[int | None]]:
    """Yield each step's id per row of `text` [B, S], None for a row that has ended, `count` times at most.

    Args: as the checked ones of `stream`; `first_row` is the number of the first row, for its random numbers.
    """
    rows = range(first_row, first_row + text.shape[0])
    # Philox is counter-based: a row's numbers depend on (seed, row) alone, not on how many rows there are.
    sources = [np.random.Generator(np.random.Philox(key=[sampling.seed, row])) for row in rows]
    running = [True] * len(rows)
    for _ in range(count):
        logits = reader.read(text).float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise RunFailure("the model's logits are not finite; generation stops; check the checkpoint")
        uniforms = np.array([source.random() for source in sources])
        before = None if sampling.repetition_penalty == 1 else text.cpu()
        drawn = draw(next_probabilities(logits, sampling, before), uniforms)
        running = [on and new not in stop for on, new in zip(running, drawn, strict=True)]
        if not any(running):
            return
        yield [new if on else None for on, new in zip(running, drawn, strict=True)]
        text = torch.cat([text, torch.tensor(drawn, device=text.device).unsqueeze(-1)], dim=1)


def check_tokens(model: LanguageModel, tokens: Sequence[int] | Tensor) -> tuple[Tensor, bool]:
    """Return tokens as [B, S] int64 on the model's device, and whether they were one text."""
    if not isinstance(model, LanguageModel):
        raise UserError(
            f"a {type(model).__name__} continues no text; allowed: a decoder's run; targets of an encoder-"
            "decoder are written by gatewright.beams"
        )
    try:
        given = tokens if isinstance(tokens, Tensor) else torch.as_tensor(np.asarray(tokens))
    except (TypeError, ValueError):
        raise UserError(
            "tokens are no ids; allowed: integers, [S] or [B, S]; encode the text first"
        ) from None
    if given.numel() == 0:
        raise UserError("no tokens; allowed: one or more; begin with the end-of-text id for an empty prompt")
    if given.dim() not in (1, 2) or given.dtype.is_floating_point or given.dtype == torch.bool:
        raise UserError(
            f"tokens of shape {list(given.shape)} and {given.dtype}; allowed: integer ids, [S] or [B, S]"
        )
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise UserError(
            f"token id {wrong}; allowed: 0 to {model.vocab_size - 1}; encode with the model's own tokenizer"
        )
    one = given.dim() == 1
    batch = given.unsqueeze(0) if one else given
    return batch.to(device=model.embedding.weight.device, dtype=torch.int64), one


def check_count(max_new_tokens: int) -> int:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens}; allowed: 0 or more")
    return max_new_tokens


def check_stop(model: LanguageModel, stop: Iterable[int]) -> frozenset[int]:
    ids = frozenset(int(i) for i in stop)
    for wrong in sorted(i for i in ids if not 0 <= i < model.vocab_size):
        raise UserError(f"stop id {wrong}; allowed: 0 to {model.vocab_size - 1}; use the tokenizer's own eot")
    return ids
