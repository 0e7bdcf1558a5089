"""Train a model that translates, from lines in several languages, and measure it on lines it has not seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gatewright.beams import BeamSearch
from gatewright.data import load_tokenizer
from gatewright.data.parallel import exchanged
from gatewright.data.translations import Direction, Ends, Translations, first_batches, first_pairs
from gatewright.errors import UserError
from gatewright.evaluation.bleu import bleu
from gatewright.experiments.pairs_run import Lines, TranslatorRun, directions, open_texts, split_ids
from gatewright.experiments.written import loss_of, write_texts
from gatewright.papers import get_paper
from gatewright.training.checkpoint import clear_leftovers, write_atomic
from gatewright.training.interrupt import stop_on_signals
from gatewright.training.loop import refuse_used, write_result
from gatewright.training.pairs import PairRun, PairTrainer, train_pairs
from gatewright.training.result import STOPPED, RecordedRun
from gatewright.training.runlog import Progress
from gatewright.training.settings_file import check_same_settings, write_settings
from gatewright.training.workplace import command_line, environment, now, own_folder

Record = dict[str, Any]
RESULT = "pairs.json"


class TranslatorResult(RecordedRun):
    """What pairs.json holds, and where."""

    def to_text(self) -> str:
        """Return a line per direction."""
        if self.record is None:
            return STOPPED
        lines = []
        for name, own in self.record["directions"].items():
            if own is None:
                lines.append(f"{name}: no test line has both languages")
                continue
            score = "BLEU not measured" if own["bleu"] is None else f"BLEU {own['bleu']:.2f}"
            lines.append(
                f"{name}: {own['nats_per_token']:.3f} nats per token of {own['lines']} test lines, "
                f"{own['wrong_nats_per_token']:.3f} with another line's source; {score}"
            )
        if self.record["bleu_missing"]:
            lines.append(self.record["bleu_missing"])
        return "\n".join([*lines, f"everything: {self.out}/{RESULT}; translate with it: {self._next()}"])

    def _next(self) -> str:
        into = self.record["into"] if self.record else []
        more = f" --into {into[0]}" if len(into) > 1 else ""
        return f"gatewright translate {self.out}{more} --text ..."


def train_translator(run: TranslatorRun) -> TranslatorResult:
    """Train a model of pairs and write OUT: run.toml, tokenizer.json, text.json, checkpoints/, pairs.json.

    Raises: UserError for settings or data that cannot work, and where a resumed run has others; RunFailure
    and Diverged as `PairTrainer`.
    """
    out = Path(run.out)
    refuse_used(out, run.resume, RESULT)
    if run.threads:
        torch.set_num_threads(run.threads)
    with Progress(run.paper) as progress:
        run, texts = open_texts(run, progress.say)
        asked = directions(run)
        held = load_tokenizer(out / "tokenizer.json") if (out / "run.toml").exists() else None
        lines = split_ids(run, texts, held)
        settings, ends = model_of(run, lines)
        trainer = _trainer(run, settings, lines, asked, ends)
        with own_folder(out), stop_on_signals() as stop:
            # Again, now that no other run can begin here.
            refuse_used(out, run.resume, RESULT)
            _resume_or_begin(run, settings, lines, out)
            steps = run.steps
            train_pairs(
                trainer,
                out / "checkpoints",
                lambda step, loss: progress.update(step / steps, f"loss {loss:.3f}"),
                lambda: _dev(trainer, lines, asked, ends, run.test_lines),
                lambda: bool(stop),
            )
            if trainer.step < steps:
                return TranslatorResult(out, None, True)
            record = _record(run, trainer, lines, asked, ends, progress)
            write_result(out / RESULT, record)
    return TranslatorResult(out, record, False)


def model_of(run: TranslatorRun, lines: Lines) -> tuple[Any, Ends]:
    """Return the model's settings, with the vocabulary of these lines, and its ids beside it."""
    model = get_paper(run.paper).Settings() if run.model is None else run.model
    settings = dataclasses.replace(model, vocab_size=lines.tokenizer.vocab_size)
    return settings, lines.ends(run.into, settings.num_sentinels)


def _resume_or_begin(run: TranslatorRun, settings: Any, lines: Lines, out: Path) -> None:
    """Check that a run which goes on has the settings and the text that it began with, or write them."""
    clear_leftovers(out)
    path, text = out / "run.toml", out / "text.json"
    if path.exists():
        check_same_settings(path, run, settings)
        if json.loads(text.read_text(encoding="utf-8"))["text"] != lines.print:
            raise UserError(
                f"the text is not the one that {out} was begun with; give that one, or another --out"
            )
        return
    write_atomic(out / "tokenizer.json", lines.tokenizer.to_json())
    write_atomic(text, json.dumps({"schema": "gatewright.pairs-text.v1", "text": lines.print}) + "\n")
    write_settings(path, run, settings)


def _trainer(
    run: TranslatorRun, settings: Any, lines: Lines, asked: Sequence[Direction], ends: Ends
) -> PairTrainer:
    paper = get_paper(run.paper)
    torch.manual_seed(run.seed)
    train = lines.parts["train"]
    there = sum(len(first_pairs(train, own, len(train[own[0]]))[own[0]]) for own in asked)
    if not there:
        raise UserError(
            f"no training pair has 1 to {run.longest} ids on both sides; give more lines, or raise longest"
        )
    stream = Translations(train, asked, ends, batch_size=min(run.rows, there), seed=run.seed)
    warm = max(1, min(run.warmup_steps, run.steps // 4))
    steps = PairRun(run.steps, run.learning_rate, warm, seed=run.seed, checkpoint_every=run.checkpoint_every)
    return PairTrainer(paper.build(settings), paper.objective(settings), stream, steps)


def _dev(
    trainer: PairTrainer, lines: Lines, asked: Sequence[Direction], ends: Ends, most: int
) -> dict[str, float]:
    dev = lines.parts["dev"]
    nats, count = loss_of(trainer.model, [b for own in asked for b in first_batches(dev, own, ends, most)])
    return {"tokens": trainer.tokens, **({"dev": nats / count} if count else {})}


def _record(
    run: TranslatorRun,
    trainer: PairTrainer,
    lines: Lines,
    asked: Sequence[Direction],
    ends: Ends,
    progress: Progress,
) -> Record:
    """Return what the finished model came to on the test lines of every direction."""
    stream: Any = trainer.stream
    found: Record = {}
    for place, own in enumerate(asked):
        progress.update(place / len(asked), f"translating {'-'.join(own)}")
        found["-".join(own)] = measured(trainer.model, lines, own, ends, run)
    whole = [own for own in found.values() if own is not None]
    missing = next((own["bleu_missing"] for own in whole if own["bleu"] is None), "")
    return {
        "schema": "gatewright.pairs.v1",
        "command": command_line(),
        "created": now(),
        "environment": environment("cpu"),
        "paper": run.paper,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "text": lines.print,
        "into": list(run.into),
        "train": {
            "steps": trainer.step,
            "pairs": len(stream.pairs),
            "rows": stream.batch_size,
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "curve": trainer.curve,
        },
        "bleu_missing": missing,
        "directions": found,
    }


def measured(model: Any, lines: Lines, direction: Direction, ends: Ends, run: TranslatorRun) -> Record | None:
    """Return nats per token of the first test lines of a direction, with their source and with another
    line's, their BLEU and three of them; None if no test line has both languages.
    """
    test = lines.parts["test"]
    batches = first_batches(test, direction, ends, run.test_lines)
    if not batches:
        return None
    decode = lines.tokenizer.decode
    own = first_pairs(test, direction, run.test_lines)
    given, wanted = ([decode(ids) for ids in own[name]] for name in direction)
    nats, count = loss_of(model, batches)
    wrong, _ = loss_of(model, [exchanged(batch) for batch in batches])
    search = BeamSearch(run.beams, run.alpha, run.longest + 1)
    written = write_texts(model, batches, lines.tokenizer, ends, search)
    score: Record = {"bleu": None, "signature": None}
    try:
        scored = bleu(written, wanted)
        score = {"bleu": scored.score, "signature": scored.signature}
    except UserError as error:
        # The run is done: a measure that is not installed does not lose it.
        score["bleu_missing"] = str(error)
    samples = [
        dict(zip(("source", "wanted", "written"), row, strict=True))
        for row in zip(given, wanted, written, strict=True)
    ]
    return {
        "lines": len(wanted),
        "tokens": count,
        "nats_per_token": nats / count,
        "wrong_nats_per_token": wrong / count,
        **score,
        "samples": samples[:3],
    }
