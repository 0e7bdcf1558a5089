"""One model, its optimizer and its place in the token stream: what a run, and each side of a race,
advances step by step.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatewright.backbones import Cost, EncoderDecoder, LanguageModel, count_cost
from gatewright.data import Corpus
from gatewright.errors import Diverged, UserError
from gatewright.evaluation import Bits, take_bytes
from gatewright.objectives import Loss
from gatewright.papers.registry import get_trained_paper
from gatewright.parts import Stats
from gatewright.parts.draws import fold
from gatewright.parts.running import RunningCounts
from gatewright.training.checkpoint import Checkpoint, check_tensors, optimizer_tensors, restore_optimizer
from gatewright.training.checks import micro_batch_size, resolve_device
from gatewright.training.history import History
from gatewright.training.optimizer import AveragedWeights, build_adamw
from gatewright.training.precision import autocast, set_router_dtype
from gatewright.training.run import TrainRun
from gatewright.training.schedule import rate_factor
from gatewright.training.state import first_nonfinite, saved_buffers, update_rules
from gatewright.training.tasks import ask, bits_of
from gatewright.training.workload import tokens_per_expert


class Trainer:
    """Advances one model on one corpus. Every number it makes follows from `run` and the step."""

    def __init__(self, run: TrainRun, corpus: Corpus, name: str = "model") -> None:
        self.run, self.corpus, self.name = run, corpus, name
        self.device = resolve_device(run.device)
        paper = get_trained_paper(run.paper)
        settings = paper.Settings() if run.model is None else run.model
        self.settings = dataclasses.replace(settings, vocab_size=corpus.tokenizer.vocab_size)
        self.context: int = self.window()
        self.micro_size = micro_batch_size(run, self.context)
        torch.manual_seed(run.seed)
        self.model: nn.Module = self.fresh_model().to(self.device)
        if isinstance(self.model, LanguageModel | EncoderDecoder):
            self.model.recompute = run.recompute == "blocks"
        set_router_dtype(self.model, run.router_dtype)
        self.objective = dataclasses.replace(paper.objective(self.settings), scope=run.balance_scope)
        self.average = AveragedWeights(self.model, run.ema) if run.ema else None
        self.optimizer = build_adamw(self.model, run, run.learning_rate, self.average)
        self.cost: Cost = count_cost(self.model, self.context)
        rows = self.micro_size * run.accumulation
        self.stream = corpus.stream(rows, self.context, seed=run.data_seed, fraction=run.data_fraction)
        self.step_tokens = rows * self.context
        self.tokens_per_expert = tokens_per_expert(self.model, self.step_tokens, rows)
        self.total_steps = max(1, round(run.tokens / self.step_tokens))
        self.step, self.seconds = 0, 0.0
        self.history = History()
        self._names = {p: n for n, p in self.model.named_parameters()}
        # What rules learn from loads (selection biases, penalties) is state like any weight.
        self._state = {**dict(self.model.named_parameters()), **dict(saved_buffers(self.model))}
        routed = isinstance(self.model, LanguageModel | EncoderDecoder)
        self._routers = self.model.routers() if routed else {}
        self.validation_text = self._validation_text()

    def fresh_model(self) -> Any:
        """Return the model that the first step starts from."""
        return get_trained_paper(self.run.paper).build(self.settings)

    def window(self) -> int:
        """Return the tokens of a row that are predicted."""
        context: int = self.settings.context
        return context

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.step_tokens

    @property
    def progress(self) -> float:
        """Share of the run that is done, by tokens or, with a limit in minutes, by the clock if ahead."""
        by_tokens = self.step / self.total_steps
        if self.run.minutes is None:
            return by_tokens
        return min(1.0, max(by_tokens, self.seconds / (60 * self.run.minutes)))

    @property
    def done(self) -> bool:
        """Whether a budget is spent."""
        if self.progress >= 1:
            return True
        target = self.run.until_loss
        return (
            target is not None and bool(self.history.curve) and self.history.curve[-1]["valid_bpb"] <= target
        )

    def advance(self) -> dict[str, Any]:
        """Take one optimizer step and return its record (loss in nats per token, rate, seconds, ...)."""
        started = time.perf_counter()
        rate = self.run.learning_rate * rate_factor(
            self.run.schedule,
            self.step,
            self.progress,
            warmup_steps=self.run.warmup_steps,
            decay_share=self.run.decay_share,
            final_rate=self.run.final_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = torch.from_numpy(self.stream.batch(self.step)).to(self.device)
        loss, stats = self._gradients(batch)
        loss_value, norm_value = float(loss), float(self.optimizer.total_norm())
        finite = bool(np.isfinite(loss_value) and np.isfinite(norm_value))
        if finite:
            self.optimizer.step(norm=norm_value)
            update_rules(self._routers, stats)
        fault = "" if finite else self._nonfinite_line(loss_value, norm_value, stats)
        self.optimizer.zero_grad(set_to_none=True)
        if fault and self.run.on_nonfinite == "stop":
            raise Diverged(fault)
        self.step += 1
        took = time.perf_counter() - started
        self.seconds += took
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": loss_value,
            "learning_rate": rate,
            "seconds": self.seconds,
            "step_seconds": took,
            "gradient_norm": norm_value,
            "skipped": not finite,
        }
        self.history.note_step(record, stats, self.run.log_every)
        return record

    def _gradients(self, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Accumulate one step's gradients; return the mean task loss and what each router counted."""
        loss = torch.zeros((), device=self.device)
        counted: dict[str, dict[str, Tensor]] = {}
        root, running = torch.tensor(self.run.seed, device=self.device), RunningCounts()
        for place, micro in enumerate(batch.split(self.micro_size)):
            # Noise and coins follow from seed, step and micro-batch: a resumed run repeats them.
            key = fold(root, self.step, place)
            with autocast(self.run.precision, self.device):
                parts, stats = self.loss_of(micro, key, running)
            (parts.total / self.run.accumulation).backward()
            loss += parts.task.detach() / self.run.accumulation
            for router, record in stats.items():
                own = {
                    "counts": record.counts,
                    "kept": record.kept,
                    "nonfinite": record.nonfinite,
                    "tokens": record.tokens,
                }
                held = counted.get(router)
                counted[router] = own if held is None else {k: held[k] + v for k, v in own.items()}
        return loss, counted

    def loss_of(self, micro: Tensor, key: Tensor, running: RunningCounts) -> tuple[Loss, Stats]:
        """Return one micro-batch's loss, and what the routers saw of it."""
        output, targets = self.ask(self.model, micro, key)
        return self.objective(output, targets, **self._counts(running, output.stats)), output.stats

    def ask(self, model: nn.Module, micro: Tensor, key: Tensor) -> tuple[Any, Tensor]:
        """Return a model's output on a micro-batch, and the ids that its logits are about."""
        return ask(model, self.objective, micro, key)

    def _counts(self, running: RunningCounts, stats: Stats) -> dict[str, Any]:
        """Return what the objective wants to know of the step's other micro-batches."""
        if self.run.balance_scope != "global_batch":
            return {}
        running.add(stats)
        return {"counts": running.counts}

    def _nonfinite_line(self, loss: float, norm: float, stats: dict[str, Any]) -> str:
        where = first_nonfinite(self._names, stats)
        return (
            f"step {self.step + 1} of {self.name}: loss {loss}, gradient norm {norm}; {where}; the weights "
            "are those of the step "
            "before; lower the learning rate, or skip such steps with --on-nonfinite skip"
        )

    def _validation_text(self) -> dict[str, np.ndarray]:
        share = max(1, self.run.eval_bytes // len(self.corpus.domains))
        lengths = self.corpus.tokenizer.byte_lengths
        return {d: take_bytes(self.corpus.valid(d).tokens, lengths, share) for d in self.corpus.domains}

    def evaluate(self) -> Bits:
        """Return bits per byte on the validation text and add a point to the curve.

        Until the budget is spent the averaged weights are evaluated, so that points of a constant rate
        compare and none jumps; the last evaluation is of the live ones.
        """
        averaged = self.average if self.progress < 1 else None
        if averaged is not None:
            averaged.swap()
        bits = bits_of(
            self.model,
            self.objective,
            self.validation_text,
            self.corpus.tokenizer.byte_lengths,
            context=self.context,
            batch_size=self.micro_size,
            autocast=autocast(self.run.precision, self.device),
        )
        if averaged is not None:
            averaged.swap()
        self.history.curve.append(
            {
                "step": self.step,
                "tokens": self.tokens,
                "train_flops": self.tokens * self.cost.train_flops_per_token,
                "seconds": self.seconds,
                "valid_bpb": bits.bits_per_byte,
                "domains": bits.domains,
                "weights": "live" if averaged is None else "averaged",
                "learning_rate": self.optimizer.param_groups[0]["lr"],
            }
        )
        return bits

    def checkpoint(self) -> Checkpoint:
        """Return everything that the next step depends on, and the history so far."""
        tensors = {
            "model": dict(self._state),
            "optimizer": optimizer_tensors(self.optimizer, self._names),
        }
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history.to_dict(),
        }
        state["corpus"] = self.corpus.fingerprint
        if self.average is not None:
            tensors["average"] = dict(zip(self._names.values(), self.average.values, strict=True))
            state["average_updates"] = self.average.updates
        return Checkpoint(self.step, tensors, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`. Raises: UserError if it is of other text or not what this run needs."""
        own = self.checkpoint()
        if checkpoint.state.get("corpus") != own.state["corpus"]:
            raise UserError(
                "the checkpoint was trained on other text or another tokenizer; allowed: the same data; "
                "give the same --data, or another --out"
            )
        lacking = sorted(own.state.keys() - checkpoint.state.keys())
        if lacking or checkpoint.state["step"] != checkpoint.step:
            raise UserError(
                f"the checkpoint's state {'lacks ' + lacking[0] if lacking else 'is of another step'}; "
                "allowed: what this version writes; give another --out"
            )
        shapes = {name: tuple(p.shape) for p, name in self._names.items()}
        buffers = {name: tuple(b.shape) for name, b in saved_buffers(self.model)}
        check_tensors(checkpoint.tensors, shapes, averaged=self.average is not None, buffers=buffers)
        held = checkpoint.tensors["model"]
        with torch.no_grad():
            for name, value in self._state.items():
                value.copy_(held[name])
            if self.average is not None:
                for value, name in zip(self.average.values, self._names.values(), strict=True):
                    value.copy_(checkpoint.tensors["average"][name])
                self.average.updates = checkpoint.state["average_updates"]
        restore_optimizer(self.optimizer, self._names, checkpoint.tensors["optimizer"])
        self.step, self.seconds = checkpoint.state["step"], checkpoint.state["seconds"]
        self.history = History.from_dict(checkpoint.state["history"])
