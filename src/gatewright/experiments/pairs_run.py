"""The settings of a translation model, and the lines that they ask for, split and in the model's ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gatewright.data import Tokenizer, train_bpe
from gatewright.data.hashing import digest
from gatewright.data.line_tables import Texts, read_table
from gatewright.data.parallel import LANGUAGES, TARGET, fetch, verses
from gatewright.data.tokenizer import LARGEST_BPE, SMALLEST_BPE
from gatewright.data.translations import Direction, Ends, Ids, encode_each, split_lines
from gatewright.errors import UserError, did_you_mean

PAPERS = ("gshard", "switch_t5")


@dataclass(frozen=True)
class TranslatorRun:
    """Train a model of pairs to translate. A source begins with the tag of the language that is wanted."""

    paper: str = "gshard"
    """id of the paper whose model this is: gshard or switch_t5"""
    model: Any = None
    """the paper's Settings; None is its small default"""
    data: str | None = None
    """tab-separated file, a language per column, its languages in the first line; none: verses in eleven
    languages, fetched by npm
    """
    languages: tuple[str, ...] = ()
    """languages of the sources; none given: every one of the data but a single `into`"""
    into: tuple[str, ...] = (TARGET,)
    """languages of the targets; with several, every source is paired with each that is not its own"""
    pieces: int = 2000
    """ids of the byte-level BPE, trained on the training lines of all languages together"""
    longest: int = 40
    """most ids of a line on either side; a pair with a longer one is left out"""
    held_out: float = 0.05
    """share of the lines that is dev text, and as much is test; equal lines stay on one side"""
    out: str = "runs/pairs"
    """folder of the run"""
    steps: int = 1000
    """optimizer steps"""
    rows: int = 64
    """pairs per step, or all where there are fewer"""
    learning_rate: float = 5e-3
    """peak learning rate; a cosine goes down to a tenth of it"""
    warmup_steps: int = 100
    """steps of linear warm-up, a quarter of the run at most"""
    test_lines: int = 64
    """test lines of each direction that are translated for BLEU"""
    beams: int = 4
    """beams with which they are"""
    alpha: float = 0.6
    """power of the length that a log-probability is divided by; 0 is none"""
    seed: int = 0
    """of the weights, the order of the pairs, and the split"""
    checkpoint_every: int = 100
    """steps from one checkpoint to the next; one stays"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    resume: bool = False
    """continue from the newest whole checkpoint in `out`"""

    def __post_init__(self) -> None:
        if self.paper not in PAPERS:
            raise UserError(
                f"paper {self.paper!r} is no model of pairs{did_you_mean(self.paper, PAPERS)}; allowed: "
                f"{', '.join(PAPERS)}"
            )
        least = {"longest": 1, "steps": 1, "rows": 1, "warmup_steps": 1, "test_lines": 1}
        least |= {"checkpoint_every": 1, "threads": 0, "beams": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name} {getattr(self, name)}; allowed: {value} or more")
        if not SMALLEST_BPE <= self.pieces <= LARGEST_BPE:
            raise UserError(f"pieces {self.pieces}; allowed: {SMALLEST_BPE} to {LARGEST_BPE}")
        if not 0 < self.held_out < 0.5:
            raise UserError(f"held_out {self.held_out}; allowed: above 0, below 0.5")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.alpha < math.inf:
            raise UserError(
                f"learning_rate {self.learning_rate}, alpha {self.alpha}; allowed: above 0, 0 or more"
            )
        if not self.into or len({*self.into}) != len(self.into):
            raise UserError(f"into {list(self.into)}; allowed: one language or more, each once")


class Lines(NamedTuple):
    """Ids of the lines by part (train, dev, test) and language; `print` is the text's fingerprint."""

    tokenizer: Tokenizer
    parts: dict[str, dict[str, list[Ids]]]
    print: str

    def ends(self, into: tuple[str, ...], num_sentinels: int) -> Ends:
        """Return the ids beside the tokenizer's: the first sentinels are the tags, the last id is the end.

        Raises: UserError where there are more languages than sentinels.
        """
        if len(into) > num_sentinels:
            raise UserError(
                f"num_sentinels {num_sentinels} for {len(into)} languages to write; allowed: one each or more"
            )
        first = self.tokenizer.vocab_size
        return Ends({language: first + i for i, language in enumerate(into)}, first + num_sentinels)


def open_texts(run: TranslatorRun, say: Callable[[str], None] = print) -> tuple[TranslatorRun, Texts]:
    """Return the run with its languages told, and their lines. Raises: UserError for one that is missing."""
    known: tuple[str, ...] = (*LANGUAGES, TARGET)
    if run.data is None:
        folder = fetch(progress=say)
    else:
        table = read_table(Path(run.data))
        known = tuple(table)
    rest = tuple(name for name in known if (name,) != run.into)
    sources = run.languages or rest
    wanted = tuple(dict.fromkeys((*sources, *run.into)))
    for name in wanted:
        if name not in known:
            raise UserError(f"language {name!r} is not in the data; allowed: {', '.join(known)}")
    texts = {name: verses(folder, name) if run.data is None else table[name] for name in wanted}
    return dataclasses.replace(run, languages=sources), texts


def directions(run: TranslatorRun) -> tuple[Direction, ...]:
    """Return every pair of a source's language and a target's other. Raises: UserError if there is none."""
    found = tuple((one, other) for one in run.languages for other in run.into if one != other)
    if not found:
        raise UserError(
            f"languages {', '.join(run.languages)} into {', '.join(run.into)}: no pair; give another language"
        )
    return found


def split_ids(run: TranslatorRun, texts: Texts, tokenizer: Tokenizer | None = None) -> Lines:
    """Return the lines in ids, by part; the pieces are learned from the training lines alone, unless a
    `tokenizer` is given.
    """
    numbers = split_lines(texts, run.seed, run.held_out, across=True)
    parts = {
        part: {language: [lines[i] for i in own] for language, lines in texts.items()}
        for part, own in numbers.items()
    }
    if tokenizer is None:
        train = [line for own in parts["train"].values() for line in own if line]
        tokenizer = train_bpe(train, run.pieces)
    same = dict.fromkeys(texts, tokenizer)
    ids = {part: encode_each(own, same, run.longest) for part, own in parts.items()}
    return Lines(tokenizer, ids, digest([f"{name}\t{line}" for name in texts for line in texts[name]]))
