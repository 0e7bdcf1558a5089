"""Translate texts with a run of `gatewright pairs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gatewright.beams import BeamSearch, beam_search
from gatewright.data import Tokenizer, load_tokenizer
from gatewright.data.parallel import padded
from gatewright.errors import UserError, did_you_mean
from gatewright.experiments.pairs_run import TranslatorRun
from gatewright.experiments.written import text_of
from gatewright.papers import get_paper
from gatewright.papers.settings_table import settings_of
from gatewright.training.checkpoint import newest_checkpoint
from gatewright.training.load import read_run_settings
from gatewright.training.state import load_weights

ROWS = 32
"""Texts that are translated at a time."""


@dataclass(frozen=True)
class TranslateSettings:
    """What is translated, and how the translations are looked for."""

    text: tuple[str, ...] = ()
    """texts to translate; none given: the lines of standard input"""
    into: str | None = None
    """language of the translations; a run that writes a single one needs it not"""
    beams: int = 4
    """beams; 1 is greedy"""
    alpha: float = 0.6
    """power of the length that a log-probability is divided by; 0 is none"""
    max_length: int = 128
    """most ids of a translation, the end included"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"threads {self.threads}; allowed: 0 (torch's own choice) or more")


@dataclass(frozen=True)
class Translator:
    """A trained model of pairs; `tags` are the ids of the languages that it writes."""

    model: Any
    tokenizer: Tokenizer
    tags: dict[str, int]
    end: int
    longest: int
    step: int

    def translate(
        self, texts: Sequence[str], into: str | None = None, search: BeamSearch | None = None
    ) -> list[dict[str, Any]]:
        """Return for each text {"source", "text", "log_probability" in nats, "score"}, in order.

        Raises: UserError for a language that the model does not write, and for an empty text.
        """
        tag = self.tags[self._language(into)]
        encoded = self.tokenizer.encode_documents([text.strip() for text in texts])
        for place, ids in enumerate(encoded):
            if not len(ids):
                raise UserError(f"text {place + 1} is empty; give one or more words")
        rows = [np.concatenate([[tag], ids, [self.end]]).astype(np.int64) for ids in encoded]
        found: list[dict[str, Any]] = []
        for first in range(0, len(rows), ROWS):
            source, mask = (torch.from_numpy(a) for a in padded(rows[first : first + ROWS], self.end))
            best = beam_search(
                self.model, source, start=self.end, end=self.end, source_mask=mask, search=search
            )
            for text, own in zip(texts[first : first + ROWS], best, strict=True):
                written = own[0]
                told = {"log_probability": written.log_probability, "score": written.score}
                found.append({"source": text, "text": text_of(self.tokenizer, written.ids), **told})
        return found

    def _language(self, into: str | None) -> str:
        if into is None and len(self.tags) == 1:
            return next(iter(self.tags))
        if into is None or into not in self.tags:
            near = "" if into is None else did_you_mean(into, list(self.tags))
            raise UserError(f"into {into!r}{near}; allowed for this run: {', '.join(self.tags)}")
        return into


def open_translator(out: str | Path) -> Translator:
    """Return the newest whole checkpoint of a run of `train_translator`.

    Raises: UserError if the folder holds no such run; RunFailure if no checkpoint is whole.
    """
    out = Path(out)
    tables = read_run_settings(out)
    if "into" not in tables["run"]:
        raise UserError(f"{out} is no run of pairs; give the --out folder of `gatewright pairs`")
    run = settings_of(TranslatorRun, tables["run"])
    paper = get_paper(run.paper)
    settings = settings_of(paper.Settings, tables["model"])
    held = newest_checkpoint(out / "checkpoints")
    if held is None:
        raise UserError(f"{out} holds no checkpoint yet; wait for its first, or train on")
    model = paper.build(settings)
    load_weights(model, held.tensors["model"])
    tokenizer = load_tokenizer(out / "tokenizer.json")
    first = tokenizer.vocab_size
    tags = {language: first + place for place, language in enumerate(run.into)}
    return Translator(model.eval(), tokenizer, tags, first + settings.num_sentinels, run.longest, held.step)
