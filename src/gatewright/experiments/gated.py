"""Small language models of 2017, trained with early stopping: perplexity, and how evenly their gates divide
the text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatewright.backbones import LSTMDecoder, count_cost
from gatewright.data import Corpus, open_corpus
from gatewright.evaluation import bits_per_byte, take_bytes
from gatewright.experiments.lab import Record, kept
from gatewright.experiments.steps import Stepper
from gatewright.papers.sparsely_gated import Settings, build, objective
from gatewright.parts import MoELayer
from gatewright.parts.draws import fold
from gatewright.parts.variation import squared_variation
from gatewright.training.runlog import Progress

Show = Callable[[float], None]


@dataclass(frozen=True)
class Model:
    """One row of a table: its settings (vocabulary and context are the plan's) and the paper's figures."""

    name: str
    settings: Settings
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class GatedPlan:
    """What all rows share: `steps` of `rows` texts of `context` tokens, `evaluations` on the first half of
    the held-out text; training ends after `patience` of them without a new best, and the best counts.
    """

    models: tuple[Model, ...]
    tokenizer: str = "bpe:1024"
    context: int = 32
    rows: int = 64
    steps: int = 1600
    seeds: tuple[int, ...] = (0, 1)
    learning_rate: float = 5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    evaluations: int = 8
    patience: int = 3
    eval_bytes: int = 262_144

    def settings(self, model: Model, vocab_size: int) -> Settings:
        """Return a row's settings with the vocabulary and context of the plan."""
        return replace(model.settings, vocab_size=vocab_size, context=self.context)


def quick_form(plan: GatedPlan, steps: int) -> GatedPlan:
    """Return the plan that takes minutes: seed 0, fewer steps, less text to evaluate."""
    return replace(
        plan,
        seeds=plan.seeds[:1],
        steps=max(steps, 1),
        warmup_steps=min(plan.warmup_steps, steps // 10 + 1),
        evaluations=4,
        eval_bytes=plan.eval_bytes // 4,
    )


def shared(plan: GatedPlan) -> Record:
    """Return what all rows share, as plain data."""
    return {k: v for k, v in json.loads(json.dumps(asdict(plan))).items() if k != "models"}


def run_rows(plan: GatedPlan, work: Path, about: str) -> Record:
    """Return {"plan", "rows": {name: ...}, "data"}; every finished row and seed is kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    rows: Record = {}
    jobs = [(model, seed) for model in plan.models for seed in plan.seeds]
    with Progress(about) as progress:
        corpus = open_corpus((), tokenizer=plan.tokenizer, progress=progress.say)
        for place, (model, seed) in enumerate(jobs):

            def show(share: float, place: int = place, name: str = f"{model.name}, seed {seed}") -> None:
                progress.update((place + share) / len(jobs), f"{name} ({place + 1} of {len(jobs)})")

            show(0.0)
            own = plan.settings(model, corpus.tokenizer.vocab_size)
            settings = {"model": asdict(own), "seed": seed, "plan": shared(plan), "text": corpus.fingerprint}
            path = work / f"{model.name}-{seed}.json".replace("/", "-").replace(" ", "")
            about_row = {"paper": dict(model.paper), **_facts(own), "seeds": []}
            found = kept(path, settings, partial(train, plan, model, corpus, seed, show))
            rows.setdefault(model.name, about_row)["seeds"].append(found)
    return {
        "schema": "gatewright.gated.v1",
        "plan": shared(plan),
        "data": {"text": corpus.fingerprint, "train_tokens": corpus.train_tokens},
        "rows": rows,
    }


def _facts(settings: Settings) -> Record:
    with torch.device("meta"):
        cost = count_cost(build(settings), settings.context)
    return {
        "settings": asdict(settings),
        "operations": cost.inner_operations,
        "parameters": cost.inner_parameters,
        "head_operations": cost.flops["head"] / 2,
    }


def held_out(corpus: Corpus, num_bytes: int, half: int) -> dict[str, np.ndarray]:
    """Return tokens of each domain's held-out text, `num_bytes` over all: of half 0 or of half 1 of it."""
    share, lengths = max(1, num_bytes // len(corpus.domains)), corpus.tokenizer.byte_lengths
    texts = {}
    for domain in corpus.domains:
        tokens = corpus.valid(domain).tokens
        middle = len(tokens) // 2
        texts[domain] = take_bytes(tokens[:middle] if half == 0 else tokens[middle:], lengths, share)
    return texts


def fit(
    plan: GatedPlan, model: Model, corpus: Corpus, seed: int, show: Show = lambda share: None
) -> tuple[LSTMDecoder, Record]:
    """Return the model at its best evaluation, and the record of its training."""
    torch.manual_seed(seed)
    settings = plan.settings(model, corpus.tokenizer.vocab_size)
    net: Any = build(settings)
    stream = corpus.stream(plan.rows, plan.context, seed=0)
    stepper = Stepper(net, stream, plan, objective(settings).losses if net.routers() else {}, seed)
    before = gate_columns(net, held_out(corpus, plan.eval_bytes, 1), plan)
    stop_text = held_out(corpus, plan.eval_bytes, 0)
    curve: list[Record] = []
    best: dict[str, Tensor] = {}
    every, started = max(1, plan.steps // plan.evaluations), time.process_time()
    while stepper.step < plan.steps:
        loss, _ = stepper.advance()
        if not math.isfinite(loss):
            return net, {"diverged_at": stepper.step}
        if stepper.step % every and stepper.step < plan.steps:
            continue
        show(stepper.step / plan.steps)
        reached = perplexity(net, stop_text, corpus, plan)["perplexity"]
        curve.append({"step": stepper.step, "perplexity": reached})
        if reached == min(point["perplexity"] for point in curve):
            best = {name: value.clone() for name, value in net.state_dict().items()}
        lowest = min(range(len(curve)), key=lambda i: curve[i]["perplexity"])
        if len(curve) - 1 - lowest >= plan.patience:
            break
    net.load_state_dict(best)
    spent = time.process_time() - started
    return net, {"curve": curve, "steps": stepper.step, "cpu_seconds": spent, "before_training": before}


def train(
    plan: GatedPlan, model: Model, corpus: Corpus, seed: int, show: Show = lambda share: None
) -> Record:
    """Return what one row came to with one seed: test perplexity and the gates' columns."""
    net, record = fit(plan, model, corpus, seed, show)
    if "diverged_at" in record:
        return {"seed": seed, **record, "perplexity": None}
    text = held_out(corpus, plan.eval_bytes, 1)
    return {
        "seed": seed,
        **record,
        **perplexity(net, text, corpus, plan),
        "gates": gate_columns(net, text, plan),
    }


def perplexity(net: nn.Module, texts: Mapping[str, np.ndarray], corpus: Corpus, plan: GatedPlan) -> Record:
    """Return exp of the mean loss per token, ends of text included, and bits per byte."""
    lengths = corpus.tokenizer.byte_lengths
    bits = bits_per_byte(net, texts, lengths, context=plan.context, batch_size=plan.rows)
    return {"perplexity": math.exp(bits.nats_per_token), "bits_per_byte": bits.bits_per_byte}


def windows(texts: Mapping[str, np.ndarray], plan: GatedPlan) -> Iterator[Tensor]:
    """Yield [rows, context] batches of whole windows, domain after domain; the last may have fewer rows."""
    for tokens in texts.values():
        flat = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        whole = flat[: len(flat) // plan.context * plan.context].view(-1, plan.context)
        yield from (batch for batch in whole.split(plan.rows) if len(batch))


@contextmanager
def noisy_gates(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for the gates, which draw their noise as in training."""
    was = net.training
    net.eval()
    layers = [module for module in net.modules() if isinstance(module, MoELayer)]
    try:
        for layer in layers:
            layer.training = True  # the layer alone: its experts stay as they are
        yield
    finally:
        net.train(was)


@torch.no_grad()
def gate_columns(net: LSTMDecoder, texts: Mapping[str, np.ndarray], plan: GatedPlan) -> Record | None:
    """Return table 6's columns over all of the text, and the loads without noise; None for a dense model.

    CV of Importance (eq 6) and of the smooth Load (eq 10), and the largest over the mean Load, with noise;
    `clean_*` of true counts without noise, as evaluation routes.
    """
    if not net.routers():
        return None
    totals: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        totals[name] = totals.get(name, torch.zeros(())) + values.double()

    with noisy_gates(net):
        for number, batch in enumerate(windows(texts, plan)):
            (record,) = net(batch, key=fold(torch.tensor(0), number)).stats.values()
            add("importance", record.sums["importance"])
            add("load", record.sums["load"])
            add("counts", record.counts)
    was = net.training
    net.eval()
    for batch in windows(texts, plan):
        (record,) = net(batch).stats.values()
        add("clean", record.counts)
    net.train(was)
    return {
        "cv_importance": _cv(totals["importance"]),
        "cv_load": _cv(totals["load"]),
        "max_over_mean": _peak(totals["load"]),
        "counted_max_over_mean": _peak(totals["counts"]),
        "clean_cv": _cv(totals["clean"]),
        "clean_max_over_mean": _peak(totals["clean"]),
        "idle": int((totals["clean"] == 0).sum()),
    }


def _cv(values: Tensor) -> float:
    return math.sqrt(float(squared_variation(values)))


def _peak(values: Tensor) -> float:
    return float(values.max() / values.mean())
