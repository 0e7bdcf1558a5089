"""Models of gshard/quality: sizes, training with a dev loss along the way, and what a finished one writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gatewright.beams import BeamSearch
from gatewright.data.parallel import TARGET, exchanged
from gatewright.data.translations import Direction, Ends, Translations, first_batches, first_pairs
from gatewright.evaluation.bleu import bleu
from gatewright.experiments.gshard_text import TRAIN, VERSES, Corpus, TextPlan
from gatewright.experiments.lab import Record
from gatewright.experiments.written import loss_of, write_texts
from gatewright.papers.gshard import Settings, build, objective
from gatewright.training.pairs import PairRun, PairTrainer, train_pairs

Show = Callable[[float], None]


@dataclass(frozen=True)
class System:
    """A size: `num_experts` 0 is dense; `num_layers` of the encoder, and as many of the decoder. Its
    `learning_rate`; None: the plan's.
    """

    name: str
    num_experts: int
    num_layers: int
    learning_rate: float | None = None


SPARSE, TWIN, BILINGUAL = "MoE(32E, 4L)", "T(4L)", "bilingual T(4L)"
FEW, DEEP, DEEP_SPARSE, MANY = "MoE(8E, 4L)", "T(8L)", "MoE(32E, 8L)", "many-to-many"
# The best of gshard/rates; the dense model's is the plan's.
SPARSE_RATE = 3e-3
SYSTEMS = (
    System(SPARSE, 32, 2, SPARSE_RATE),
    System(TWIN, 0, 2),
    System(FEW, 8, 2, SPARSE_RATE),
    System(DEEP, 0, 4),
    System(DEEP_SPARSE, 32, 4, SPARSE_RATE),
    System(BILINGUAL, 0, 2),
    System(MANY, 32, 2, SPARSE_RATE),
)


@dataclass(frozen=True)
class QualityPlan:
    """`steps` of `rows` pairs for a model of all languages, and as many in all for the bilingual ones; all
    seeds for the systems in `seeded`, the first one for the others. Dev losses are of the first `dev_lines`
    pairs of each language and source, BLEU of the first `test_lines`; `levels` in nats per token.
    """

    text: TextPlan = field(default_factory=TextPlan)
    systems: tuple[System, ...] = SYSTEMS
    seeded: tuple[str, ...] = (SPARSE, TWIN)
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 128
    steps: int = 2000
    learning_rate: float = 6e-3
    warmup_steps: int = 200
    dev_lines: int = 32
    test_lines: int = 96
    levels: tuple[float, ...] = (4.6, 4.3, 4.1)
    beams: int = 4
    alpha: float = 0.6
    model: Settings = field(
        default_factory=lambda: Settings(
            num_heads=4, head_dim=16, expert_width=128, context=40, num_sentinels=8, dropout=0.2
        )
    )

    def settings(self, system: System, corpus: Corpus) -> Settings:
        """Return a system's model. A dense layer in a mixture's place has the operations of two experts and
        of the sparse twin's gate; experts have half the width of the other layers, so that all cost alike.
        """
        sizes: dict[str, Any] = {
            "vocab_size": corpus.target.vocab_size,
            "source_vocab_size": None if corpus.shared else corpus.source.vocab_size,
            "num_layers": system.num_layers,
        }
        if system.num_experts:
            return replace(self.model, num_experts=system.num_experts, **sizes)
        gates = max(own.num_experts for own in self.systems) // 2
        wide = tuple(
            2 * _one(self.model.expert_width) + gates if i % 2 else _one(self.model.ffn_width)
            for i in range(system.num_layers)
        )
        return replace(self.model, moe_layers="none", ffn_width=wide, **sizes)


def _one(width: int | tuple[int, ...]) -> int:
    return width if isinstance(width, int) else width[0]


PLAN = QualityPlan()


def quick_form(plan: QualityPlan) -> QualityPlan:
    """Return the plan that takes minutes: seed 0, the two shallow systems of the claim, the bilingual ones
    and many-to-many, a twelfth of the steps, a sixth of the lines.
    """
    wanted = {SPARSE, TWIN, BILINGUAL, MANY}
    return replace(
        plan, seeds=plan.seeds[:1], systems=tuple(own for own in plan.systems if own.name in wanted),
        steps=max(plan.steps // 12, len(plan.text.languages)), warmup_steps=max(plan.warmup_steps // 8, 1),
        dev_lines=max(plan.dev_lines // 4, 2), test_lines=max(plan.test_lines // 6, 2), beams=1,
    )  # fmt: skip


def run_model(
    plan: QualityPlan,
    settings: Settings,
    corpus: Corpus,
    directions: Sequence[Direction],
    asked: Sequence[Direction],
    seed: int,
    folder: Path,
    show: Show = lambda share: None,
    share: float = 1.0,
) -> Record:
    """Return what one model came to: it is trained on `directions` in a `share` of the steps and translates
    in those that are `asked`.
    """
    torch.manual_seed(seed)
    model: Any = build(settings)
    ends = corpus.ends(settings.num_sentinels)
    train = corpus.parts[TRAIN]
    there = sum(len(first_pairs(train, own, len(train[TARGET]))[own[0]]) for own in directions)
    stream = Translations(train, directions, ends, batch_size=min(plan.rows, there), seed=seed)
    steps = max(1, round(plan.steps * share))
    warm = max(1, min(plan.warmup_steps, steps // 4))
    # Eight checkpoints of a run: what a stop costs is minutes, whatever the length.
    run = PairRun(steps, plan.learning_rate, warm, seed=seed, checkpoint_every=max(1, steps // 8))
    trainer = PairTrainer(model, objective(settings), stream, run)
    dev = [
        batch
        for part in corpus.parts
        if part.startswith("dev/")
        for direction in directions
        for batch in first_batches(corpus.parts[part], direction, ends, plan.dev_lines)
    ]

    def measure() -> dict[str, float]:
        nats, count = loss_of(model, dev)
        return {"dev": nats / count, "tokens": trainer.tokens}

    train_pairs(trainer, folder, lambda step, loss: show(0.8 * step / steps), measure)
    found: Record = {}
    for place, direction in enumerate(asked):
        found["-".join(direction)] = quality(plan, model, corpus, direction, ends)
        show(0.8 + 0.2 * (place + 1) / len(asked))
    took: Record = {
        "steps": steps,
        "rows": stream.batch_size,
        "pairs": len(stream.pairs),
        "tokens": trainer.tokens,
    }
    took |= {"seconds": trainer.seconds, "curve": trainer.curve}
    return {"seed": seed, "train": took, "directions": found}


def quality(plan: QualityPlan, model: Any, corpus: Corpus, direction: Direction, ends: Ends) -> Record:
    """Return what a model makes of the test lines of one direction, by source and over verses and catalogs
    together ("bleu"): nats with the right source and with another line's, BLEU, and the BLEU of the same
    translations when each stands against the line before it.
    """
    started = time.process_time()
    sources: Record = {}
    written: dict[str, list[str]] = {}
    wanted: dict[str, list[str]] = {}
    for part in (name for name in corpus.parts if name.startswith("test/")):
        batches = first_batches(corpus.parts[part], direction, ends, plan.test_lines)
        if not batches:
            continue
        source = part.partition("/")[2]
        nats, count = loss_of(model, batches)
        wrong, _ = loss_of(model, [exchanged(batch) for batch in batches])
        own = first_pairs(corpus.parts[part], direction, plan.test_lines)
        search = BeamSearch(plan.beams, plan.alpha, plan.text.longest + 1)
        written[source] = write_texts(model, batches, corpus.target, ends, search)
        wanted[source] = [corpus.target.decode(ids) for ids in own[direction[1]]]
        given = [corpus.source.decode(ids) for ids in own[direction[0]]]
        score = bleu(written[source], wanted[source])
        sources[source] = {
            "nats": nats, "wrong_nats": wrong, "tokens": count, "lines": len(given), "bleu": score.score,
            "control_bleu": bleu(_moved(written[source]), wanted[source]).score,
            "signature": score.signature,
        }  # fmt: skip
        if source == VERSES:  # the others' licence is not this repository's
            sources[source]["sample"] = [given[0], wanted[source][0], written[source][0]]
    together = [source for source in written if f"dev/{source}" in corpus.parts]
    texts, references = ([line for s in together for line in of[s]] for of in (written, wanted))
    return {
        "bleu": bleu(texts, references).score,
        "control_bleu": bleu(_moved(texts), references).score,
        "nats": sum(sources[s]["nats"] for s in together),
        "wrong_nats": sum(sources[s]["wrong_nats"] for s in together),
        "tokens": sum(sources[s]["tokens"] for s in together),
        "sources": sources,
        "seconds": time.process_time() - started,
    }


def _moved(lines: list[str]) -> list[str]:
    return [*lines[-1:], *lines[:-1]]
