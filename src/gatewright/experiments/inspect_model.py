"""Inspect a model on texts in domains: one pass, a result, a trace and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gatewright.data import open_corpus
from gatewright.errors import UserError
from gatewright.experiments.inspect_open import InspectRun, Opened, open_model
from gatewright.experiments.trace import TraceFile, read_text
from gatewright.inspection import survey, write_report
from gatewright.inspection.inspected import router_lines, summary_text
from gatewright.training.loop import write_result
from gatewright.training.runlog import Progress
from gatewright.training.workplace import command_line, environment, now, own_folder

RESULT, TRACE = "inspect.json", "trace.jsonl"


@dataclass(frozen=True)
class InspectResult:
    """`record` is what inspect.json holds."""

    out: Path
    record: dict[str, Any] = field(repr=False)
    traced: bool = True

    @property
    def side(self) -> dict[str, Any]:
        """The inspected model."""
        side: dict[str, Any] = self.record["runs"][0]["sides"][0]
        return side

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: every router in numbers, and where everything is."""
        return {
            "out": str(self.out),
            "model": self.side["label"],
            "tokens": self.side["inspected"]["tokens"],
            "domains": self.side["specialisation"]["domains"],
            "routers": [
                {
                    "name": line.name,
                    "num_experts": line.experts,
                    "num_selected": line.selected,
                    "load_entropy": line.entropy,
                    "max_over_mean": line.largest,
                    "dead_experts": list(line.dead),
                    "largest_domain_share_over_chance": line.special,
                }
                for line in router_lines(self.side)
            ],
            "result": str(self.out / RESULT),
            "trace": str(self.out / TRACE) if self.traced else None,
            "report": str(self.out / "report.html"),
        }

    def to_text(self) -> str:
        """Return a line per router, and where the page is."""
        read = f"{self.side['label']}: {self.side['inspected']['tokens']:,} tokens"
        domains = ", ".join(self.side["specialisation"]["domains"])
        return f"{read} of {domains}\n{summary_text(self.side)}\nreport: {self.out / 'report.html'}"


def inspect_model(folder: str | Path, options: InspectRun | None = None) -> InspectResult:
    """Return where the model of a folder sends tokens; writes inspect.json, trace.jsonl and report.html.

    Raises: UserError for a folder that holds neither a run of ours nor a checkpoint of transformers, a model
    without a router, and text that cannot be read.
    """
    folder, options = Path(folder), options or InspectRun()
    out = Path(options.out or f"runs/inspect-{folder.resolve().name}")
    if (out / "report.html").exists() and not (out / RESULT).exists():
        raise UserError(
            f"{out} holds another report; allowed: a new folder or one of an inspection; give --out"
        )
    with Progress("inspect") as progress:
        progress.say(f"opening {folder}")
        opened = open_model(folder, options)
        texts, about = _texts(opened, options, progress.say)
        with own_folder(out):
            found = _survey(opened, texts, options, out, progress)
            record = _record(opened, found, about, options)
            write_result(out / RESULT, record)
            progress.say("drawing the page")
            write_report(record, out)
    return InspectResult(out, record, options.trace)


def _texts(
    opened: Opened, options: InspectRun, say: Callable[[str], None]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tokens of each domain, and the text in words."""
    if options.text:
        texts = {}
        for given in options.text:
            domain, number = Path(given).stem, 1
            while domain in texts:
                number += 1
                domain = f"{Path(given).stem}-{number}"
            texts[domain] = opened.tokenizer.encode(read_text(Path(given)))
        about = {"name": ", ".join(options.text), "domains": list(texts)}
    else:
        data = options.data or opened.data
        corpus = open_corpus(data, tokenizer=opened.tokenizer_path, seed=opened.data_seed, progress=say)
        texts = {domain: corpus.valid(domain).tokens for domain in corpus.domains}
        if opened.foreign:
            # The end-of-text id of the corpus may be one that the model was never given.
            texts = {domain: ids[ids != corpus.tokenizer.eot] for domain, ids in texts.items()}
        about = {"name": corpus.name, "domains": list(texts), "fingerprint": corpus.fingerprint}
    _check_ids(opened, texts)
    return texts, {**about, "tokenizer": opened.tokenizer.name, "context": opened.context}


def _check_ids(opened: Opened, texts: Mapping[str, np.ndarray]) -> None:
    """Raise UserError for text without a token, and for ids that the model has no embedding for."""
    for domain, ids in texts.items():
        if not len(ids):
            raise UserError(f"text {domain} holds no token; allowed: text with something in it; leave it out")
        if int(ids.max()) >= opened.vocabulary:
            raise UserError(
                f"text {domain} has token id {int(ids.max())}, but the model has {opened.vocabulary} "
                "embeddings; allowed: the model's own tokenizer; give --tokenizer PATH"
            )


def _survey(
    opened: Opened, texts: Mapping[str, np.ndarray], options: InspectRun, out: Path, progress: Progress
) -> dict[str, Any]:
    trace = TraceFile(out / TRACE) if options.trace else None
    if trace is None:
        # One of an earlier inspection would not be of this result.
        (out / TRACE).unlink(missing_ok=True)
    try:
        found = survey(
            opened.model,
            texts,
            opened.tokenizer,
            context=opened.context,
            batch_size=options.batch_size,
            most_tokens=options.tokens,
            start=opened.start,
            on_window=None if trace is None else trace.write,
            progress=progress.update,
        )
    except BaseException:
        if trace is not None:
            trace.abandon()
        raise
    if trace is not None:
        trace.finish()
    return found


def _record(
    opened: Opened, found: Mapping[str, Any], about: Mapping[str, Any], options: InspectRun
) -> dict[str, Any]:
    side = {
        "name": opened.name,
        "kind": "sparse",
        "label": opened.label,
        "settings": json.loads(json.dumps(opened.settings, default=str)),
        "total_parameters": sum(parameter.numel() for parameter in opened.model.parameters()),
        **found,
    }
    return {
        "schema": "gatewright.inspect.v1",
        "title": f"{opened.name}: where tokens go",
        "command": command_line(),
        "created": now(),
        "environment": environment(options.device),
        "data": dict(about),
        "runs": [{"seed": 0, "sides": [side]}],
    }
