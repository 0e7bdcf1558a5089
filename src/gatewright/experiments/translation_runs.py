"""Models of sparsely_gated/translation: the plan that they share, the verses, training and translating."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gatewright.backbones import RecurrentEncoderDecoder
from gatewright.beams import BeamSearch, beam_search
from gatewright.data import train_bpe
from gatewright.data.catalogs import catalog_lines, fetch_catalogs
from gatewright.data.hashing import permutation
from gatewright.data.parallel import exchanged, fetch, verses
from gatewright.data.tokenizer import Tokenizer
from gatewright.data.translations import Direction, Ends, Ids, Translations, encode_lines, split_lines
from gatewright.evaluation.bleu import bleu
from gatewright.experiments.lab import Record
from gatewright.papers.sparsely_gated_mt import Settings, build, objective
from gatewright.training.pairs import PairRun, PairTrainer, held_out_loss, train_pairs

MOE, DENSE, SINGLE = "MoE-Multi", "GNMT-Multi", "GNMT-Mono"
Show = Callable[[float], None]
VERSES, CATALOGS = "verses", "catalogs"
_MODEL = Settings(width=64, num_experts=32, expert_width=128, dropout=0.1)


@dataclass(frozen=True)
class TranslationPlan:
    """Languages to and from English; `steps` of `rows` pairs for a model of all pairs, and as many in all for
    the models of one pair. A line counts if it has 1 to `longest` ids in every language; of the held-out
    verses and of the held-out catalog lines the first `test_lines` each are translated.
    """

    languages: tuple[str, ...] = ("es", "fr", "sv", "tr")
    pieces: int = 2048
    longest: int = 32
    held_out: float = 0.08
    test_lines: int = 120
    rows: int = 128
    steps: int = 2400
    seeds: tuple[int, ...] = (0, 1)
    learning_rate: float = 5e-3
    warmup_steps: int = 100
    beams: int = 4
    alpha: float = 0.6
    model: Settings = field(default_factory=lambda: _MODEL)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Every language into English, then English into every language."""
        into = tuple((language, "en") for language in self.languages)
        return (*into, *(("en", language) for language in self.languages))

    def settings(self, system: str, vocab_size: int) -> Settings:
        """Return a system's model; the dense layer has the operations of K experts and of both gates."""
        s = self.model
        sizes = {"vocab_size": vocab_size, "context": self.longest + 2, "target_context": self.longest + 1}
        if system == MOE:
            return replace(s, **sizes)  # type: ignore[arg-type]
        ffn = s.num_selected * s.expert_width + s.num_experts
        return replace(s, num_experts=0, ffn_width=ffn, **sizes)  # type: ignore[arg-type]


PLAN = TranslationPlan()


def quick_form(plan: TranslationPlan) -> TranslationPlan:
    """Return the plan that takes minutes: seed 0, a tenth of the steps, a quarter of the test lines."""
    return replace(
        plan, seeds=plan.seeds[:1], steps=max(plan.steps // 10, len(plan.directions)),
        test_lines=max(plan.test_lines // 4, 1),
    )  # fmt: skip


class Lines(NamedTuple):
    """The text as the models read it: ids by part ("train", "dev", and a test part for each kind of line) and
    language, and the tokenizer that made them.
    """

    tokenizer: Tokenizer
    parts: dict[str, dict[str, list[Ids]]]

    def ends(self, settings: Settings) -> Ends:
        """Return the model's own ids: a tag for each language, in order, and the last one."""
        first = self.tokenizer.vocab_size
        tags = {language: first + place for place, language in enumerate(self.parts["train"])}
        return Ends(tags, first + settings.num_tags)


def open_lines(plan: TranslationPlan, say: Callable[[str], None] = print) -> Lines:
    """Return verses and catalog lines, split by line; pieces are learned from the training lines alone."""
    folder, languages = fetch(progress=say), ("en", *plan.languages)
    catalogs = catalog_lines(fetch_catalogs(progress=say))
    whole = [row for row in zip(*(catalogs[name] for name in languages), strict=True) if all(row)]
    kinds = {
        VERSES: {language: verses(folder, language) for language in languages},
        CATALOGS: {language: [row[place] for row in whole] for place, language in enumerate(languages)},
    }
    return lines_of(plan, kinds)


def lines_of(plan: TranslationPlan, kinds: dict[str, dict[str, list[str]]]) -> Lines:
    """Return these kinds of texts, line by line translations of each other, as the models read them: split as
    one, so that no line of one part stands in another part of either kind.
    """
    first, *others = kinds.values()
    texts = {name: [*own, *(line for other in others for line in other[name])] for name, own in first.items()}
    numbers = split_lines(texts, 0, plan.held_out)
    seen = [lines[i] for lines in texts.values() for i in numbers["train"]]
    tokenizer = train_bpe(seen, plan.pieces)
    kind_of = np.repeat(np.arange(len(kinds)), [len(own["en"]) for own in kinds.values()])
    test = numbers.pop("test")
    # Catalogs stand in the order of their letters, and the first lines of a part are the measured ones.
    test = test[permutation(len(test), 0)]
    numbers |= {kind: test[kind_of[test] == place] for place, kind in enumerate(kinds)}
    parts = {part: encode_lines(texts, chosen, tokenizer, plan.longest) for part, chosen in numbers.items()}
    return Lines(tokenizer, parts)


def run_model(
    plan: TranslationPlan,
    settings: Settings,
    lines: Lines,
    directions: tuple[Direction, ...],
    seed: int,
    folder: Path,
    show: Show = lambda share: None,
) -> Record:
    """Return what one model came to: dev loss and BLEU by direction, and what its training took."""
    torch.manual_seed(seed)
    model: Any = build(settings)
    ends, share = lines.ends(settings), len(directions) / len(plan.directions)
    streams = {
        part: Translations(lines.parts[part], directions, ends, batch_size=plan.rows, seed=seed)
        for part in ("train", "dev")
    }
    steps = max(1, round(plan.steps * share))
    warm = min(plan.warmup_steps, steps // 5 + 1)
    run = PairRun(steps, plan.learning_rate, warm, seed=seed)
    trainer = PairTrainer(model, objective(settings), streams["train"], run)
    train_pairs(trainer, folder, lambda step, loss: show(0.8 * step / steps))
    model.eval()
    pairs: Record = {}
    for place, direction in enumerate(directions):
        started = time.process_time()
        held_out = streams["dev"].in_order(place)
        nats, count = held_out_loss(model, held_out)
        wrong, _ = held_out_loss(model, map(exchanged, held_out))
        pairs["-".join(direction)] = {
            "dev_nats": nats,
            "dev_tokens": count,
            "wrong_source_nats": wrong,
            **translate(model, lines, ends, direction, plan),
            "seconds": time.process_time() - started,
        }
        show(0.8 + 0.2 * (place + 1) / len(directions))
    took = {"steps": run.steps, "tokens": trainer.tokens, "seconds": trainer.seconds, "curve": trainer.curve}
    return {"seed": seed, "train": took, "pairs": pairs}


def translate(
    model: RecurrentEncoderDecoder, lines: Lines, ends: Ends, direction: Direction, plan: TranslationPlan
) -> Record:
    """Return the BLEU of one direction's test lines, of all and of each kind, and the first two of each kind
    as they were written.
    """
    texts: dict[str, tuple[list[str], list[str]]] = {}
    samples: list[list[str]] = []
    for kind in (kind for kind in lines.parts if kind not in ("train", "dev")):
        test = {language: own[: plan.test_lines] for language, own in lines.parts[kind].items()}
        written = _written(model, lines, ends, direction, plan, test)
        given, wanted = ([lines.tokenizer.decode(ids) for ids in test[language]] for language in direction)
        texts[kind] = written, wanted
        samples += [list(one) for one in zip(given[:2], wanted[:2], written[:2], strict=True)]
    both = [[line for own in texts.values() for line in own[side]] for side in (0, 1)]
    score = bleu(both[0], both[1])
    by_kind = {kind: bleu(written, wanted).score for kind, (written, wanted) in texts.items()}
    about = {"signature": score.signature, "lines": len(both[0]), "samples": samples}
    return {"bleu": score.score, "bleu_by_kind": by_kind, **about}


def _written(
    model: RecurrentEncoderDecoder,
    lines: Lines,
    ends: Ends,
    direction: Direction,
    plan: TranslationPlan,
    test: dict[str, list[Ids]],
) -> list[str]:
    """Return the best beams of these lines, in their order."""
    stream = Translations(test, (direction,), ends, batch_size=min(60, len(test["en"])))
    search = BeamSearch(plan.beams, plan.alpha, plan.longest + 1)
    texts: list[str] = []
    for batch in stream.in_order(0):
        source, mask = torch.from_numpy(batch.source), torch.from_numpy(batch.source_mask)
        found = beam_search(model, source, start=ends.end, end=ends.end, source_mask=mask, search=search)
        # A tag or a second end inside a target is no text.
        own = ([i for i in best[0].ids if i < lines.tokenizer.vocab_size] for best in found)
        texts += [lines.tokenizer.decode(ids) for ids in own]
    return texts
