"""Models of sparsely_gated/translation: the plan that they share, the verses, training and translating."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gatewright.backbones import RecurrentEncoderDecoder
from gatewright.beams import BeamSearch, beam_search
from gatewright.data import train_bpe
from gatewright.data.parallel import fetch, verses
from gatewright.data.tokenizer import Tokenizer
from gatewright.data.translations import Direction, Ends, Ids, Translations, encode_lines, split_lines
from gatewright.evaluation.bleu import bleu
from gatewright.experiments.lab import Record
from gatewright.papers.sparsely_gated_mt import Settings, build, objective
from gatewright.training.pairs import PairRun, PairTrainer, held_out_loss, train_pairs

MOE, DENSE, SINGLE = "MoE-Multi", "GNMT-Multi", "GNMT-Mono"
Show = Callable[[float], None]


@dataclass(frozen=True)
class TranslationPlan:
    """Languages to and from English; `steps` of `rows` pairs for a model of all pairs, and as many in all for
    the models of one pair. A verse counts if it has at most `longest` ids in every language; of those held
    out, the first `test_lines` are translated.
    """

    languages: tuple[str, ...] = ("es", "fr", "id", "sv")
    pieces: int = 2048
    longest: int = 40
    held_out: float = 0.08
    test_lines: int = 160
    rows: int = 32
    steps: int = 2000
    seeds: tuple[int, ...] = (0, 1)
    learning_rate: float = 1e-2
    warmup_steps: int = 50
    beams: int = 4
    alpha: float = 0.6
    model: Settings = field(default_factory=lambda: Settings(width=64, num_experts=32, expert_width=128))

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
    """The text as the models read it: ids by part and language, and the tokenizer that made them."""

    tokenizer: Tokenizer
    parts: dict[str, dict[str, list[Ids]]]

    def ends(self, settings: Settings) -> Ends:
        """Return the model's own ids: a tag for each language, in order, and the last one."""
        first = self.tokenizer.vocab_size
        tags = {language: first + place for place, language in enumerate(self.parts["train"])}
        return Ends(tags, first + settings.num_tags)


def open_lines(plan: TranslationPlan, say: Callable[[str], None] = print) -> Lines:
    """Return the verses, split by line; pieces are learned from the training lines alone."""
    folder = fetch(progress=say)
    texts = {language: verses(folder, language) for language in ("en", *plan.languages)}
    return lines_of(plan, texts)


def lines_of(plan: TranslationPlan, texts: dict[str, list[str]]) -> Lines:
    """Return these texts, line by line translations of each other, as the models read them."""
    numbers = split_lines(texts, 0, plan.held_out)
    seen = [lines[i] for lines in texts.values() for i in numbers["train"]]
    tokenizer = train_bpe(seen, plan.pieces)
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
        nats, count = held_out_loss(model, streams["dev"].in_order(place))
        written = translate(model, lines, ends, direction, plan)
        pairs["-".join(direction)] = {
            "dev_nats": nats,
            "dev_tokens": count,
            **written,
            "seconds": time.process_time() - started,
        }
        show(0.8 + 0.2 * (place + 1) / len(directions))
    took = {"steps": run.steps, "tokens": trainer.tokens, "seconds": trainer.seconds, "curve": trainer.curve}
    return {"seed": seed, "train": took, "pairs": pairs}


def translate(
    model: RecurrentEncoderDecoder, lines: Lines, ends: Ends, direction: Direction, plan: TranslationPlan
) -> Record:
    """Return the BLEU of one direction's test lines, and the first three of them as they were written."""
    test = {language: own[: plan.test_lines] for language, own in lines.parts["test"].items()}
    stream = Translations(test, (direction,), ends, batch_size=min(60, len(test["en"])))
    search = BeamSearch(plan.beams, plan.alpha, plan.longest + 1)
    decode = lines.tokenizer.decode
    texts: list[str] = []
    for batch in stream.in_order(0):
        source, mask = torch.from_numpy(batch.source), torch.from_numpy(batch.source_mask)
        found = beam_search(model, source, start=ends.end, end=ends.end, source_mask=mask, search=search)
        # A tag or a second end inside a target is no text.
        texts += [decode([i for i in best[0].ids if i < lines.tokenizer.vocab_size]) for best in found]
    wanted = [decode(ids) for ids in test[direction[1]]]
    given = [decode(ids) for ids in test[direction[0]]]
    score = bleu(texts, wanted)
    samples = [list(one) for one in zip(given[:3], wanted[:3], texts[:3], strict=True)]
    return {"bleu": score.score, "signature": score.signature, "lines": len(texts), "samples": samples}
