"""From a finished trainer to the record that result files and reports hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewright.data import Corpus
from gatewright.inspection import specialisation, token_views
from gatewright.training.trainer import Trainer

STOPPED = "stopped before the end, `--resume` continues"


@dataclass(frozen=True)
class RecordedRun:
    """A run in `out`: `record` is what its result file holds, None where the user `stopped` it early."""

    out: Path
    record: dict[str, Any] | None
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"out": str(self.out), "stopped": self.stopped, **(self.record or {})}


def data_record(corpus: Corpus, trainer: Trainer) -> dict[str, Any]:
    """Return the text that a result is about."""
    return {
        "name": corpus.name,
        "domains": list(corpus.domains),
        "train_bytes": corpus.train_bytes,
        "valid_bytes": corpus.valid_bytes,
        "eval_bytes": trainer.run.eval_bytes,
        "tokenizer": corpus.tokenizer.name,
        "context": trainer.context,
        "batch_tokens": trainer.step_tokens,
        "fingerprint": corpus.fingerprint,
        "skipped": list(corpus.skipped),
    }


def side_record(trainer: Trainer, kind: str, label: str) -> dict[str, Any]:
    """Return one model's whole record: settings, size, curve, load, specialisation and coloured text."""
    history, cost = trainer.history, trainer.cost
    last = history.curve[-1]
    seconds = max(trainer.seconds, 1e-9)
    steps = [record["step"] for record in history.log]
    return {
        "name": trainer.name,
        "kind": kind,
        "label": label,
        "paper": trainer.run.paper,
        "settings": dataclasses.asdict(trainer.settings),
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "forward_flops_per_token": cost.forward_flops_per_token,
        "train_flops_per_token": cost.train_flops_per_token,
        "flops_by_part": cost.flops,
        "learning_rate": trainer.run.learning_rate,
        "token_budget": trainer.run.tokens,
        "tokens_per_expert": trainer.tokens_per_expert,
        "steps": trainer.step,
        "train_seconds": trainer.seconds,
        "tokens_per_second": trainer.tokens / seconds,
        "curve": history.curve,
        "train_log": history.log,
        "final": {key: last[key] for key in ("valid_bpb", "domains", "tokens", "train_flops", "seconds")},
        "routers": list(history.load),
        "load_over_time": {"steps": steps, "routers": history.load},
        "dropped_over_time": {"steps": steps, "routers": history.dropped},
        **routing_record(trainer),
    }


def routing_record(trainer: Trainer) -> dict[str, Any]:
    """Return where validation tokens go: specialisation by domain, and one coloured text per domain; None
    for a dense model.
    """
    if not trainer.history.load:
        return {"specialisation": None, "token_view": None}
    texts = trainer.validation_text
    return {
        "specialisation": specialisation(trainer.model, texts, context=trainer.context),
        "token_view": token_views(trainer.model, texts, trainer.corpus.tokenizer, context=trainer.context),
    }
