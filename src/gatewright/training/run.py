"""The settings of a training run: what `gatewright train` takes and run.toml keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from gatewright.errors import UserError, did_you_mean
from gatewright.training.schedule import SCHEDULES

Precision = Literal["fp32", "bf16"]
BalanceScope = Literal["micro_batch", "sequence", "global_batch"]
IdleExperts = Literal["adamw", "skip"]
Recompute = Literal["none", "blocks"]

_WORDS = {"balance_scope": BalanceScope, "idle_experts": IdleExperts, "recompute": Recompute}


@dataclass(frozen=True)
class LoopSettings:
    """What every training loop takes, alone or in a race."""

    paper: str = "mixtral"
    """id of the paper whose model is trained; `gatewright papers` lists them"""
    model: Any = None
    """the paper's Settings; none means its small default"""
    data: tuple[str, ...] = ()
    """files and folders to train on, each a named domain; none means the default corpus"""
    tokenizer: str = "bytes"
    """bytes, bpe:N (a byte-level BPE of N ids, trained on this text), or a path to a tokenizer.json"""
    data_seed: int = 0
    """which documents are held out and how the text is shuffled"""
    batch_tokens: int = 4096
    """tokens per optimizer step"""
    accumulation: int = 1
    """micro-batches that a step's tokens are split into"""
    schedule: str = "wsd"
    """learning rate over time: constant, cosine, wsd (warm-up, stable, decay), inverse_sqrt"""
    warmup_steps: int = 100
    """steps of linear warm-up"""
    decay_share: float = 0.4
    """share of the run over which wsd decays to its final rate"""
    final_rate: float = 0.02
    """final learning rate of cosine and wsd, as a share of the peak"""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on all parameters"""
    beta1: float = 0.9
    """AdamW's decay of the first moment"""
    beta2: float = 0.95
    """AdamW's decay of the second moment"""
    adam_eps: float = 1e-8
    """AdamW's epsilon"""
    idle_experts: IdleExperts = "adamw"
    """experts that no token chose in a step: adamw (moments decay and weights move by them, as AdamW has it),
    or skip (weights and moments stay)
    """
    clip: float = 1.0
    """largest norm of the gradient; 0 is no clipping"""
    ema: float = 0.99
    """decay per step of the averaged weights that evaluations before the last one use; 0 is off"""
    precision: Precision = "fp32"
    """fp32, or bf16 for all matmuls but the routers' (weights and optimizer stay fp32)"""
    router_dtype: Precision = "fp32"
    """what the routers compute in"""
    recompute: Recompute = "none"
    """activations that the backward pass computes again instead of keeping: none, or those inside blocks
    (the same numbers in less memory, for one more forward pass per step)
    """
    balance_scope: BalanceScope = "micro_batch"
    """over what the balance loss asks for evenness: sequence, micro_batch, or global_batch (all micro-batches
    of a step, by a running count)
    """
    evaluations: int = 12
    """evaluations on validation text, evenly spread; the last one is at the end"""
    eval_bytes: int = 262_144
    """bytes of validation text per evaluation, spread evenly over the domains"""
    checkpoint_every: int = 250
    """steps between checkpoints"""
    keep_checkpoints: int = 2
    """how many checkpoints stay"""
    log_every: int = 10
    """steps between lines of the log"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """what to do when the loss or a gradient is not finite: stop, or skip the step"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    device: str = "cpu"
    """cpu, cuda, or cuda:N"""
    resume: bool = False
    """continue from the newest whole checkpoint in `out`"""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            near = did_you_mean(self.schedule, SCHEDULES)
            raise UserError(f"schedule {self.schedule!r} is unknown{near}; allowed: {', '.join(SCHEDULES)}")
        for name, words in _WORDS.items():
            given, allowed = getattr(self, name), get_args(words)
            if given not in allowed:
                near = did_you_mean(given, allowed)
                raise UserError(f"{name} {given!r} is unknown{near}; allowed: {', '.join(allowed)}")
        require_finite(self)
        _require_at_least(self, 1, "batch_tokens", "accumulation", "evaluations", "eval_bytes")
        _require_at_least(self, 1, "checkpoint_every", "keep_checkpoints", "log_every")
        _require_at_least(self, 0, "warmup_steps", "weight_decay", "clip", "threads", "adam_eps")
        require_seed(self, "data_seed")
        if self.threads > 4096:
            raise UserError(f"threads {self.threads}; allowed: 0 to 4096; 0 is torch's own choice")
        for name in ("decay_share", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}; allowed: 0 to 1; it is a share")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}; allowed: 0 up to, not including, 1")


def require_finite(settings: Any) -> None:
    """Raise UserError naming the first setting that is NaN, infinite or above 2**53."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{field.name} {value}; allowed: finite numbers; give one")
            if isinstance(number, int) and abs(number) > 2**53:
                raise UserError(f"{field.name} {value}; allowed: up to 2**53; give a smaller number")


def require_seed(settings: Any, name: str) -> None:
    """Raise UserError unless the seed is one that every generator takes."""
    if getattr(settings, name) < 0:
        raise UserError(f"{name} {getattr(settings, name)}; allowed: 0 or more")


def _require_at_least(run: Any, least: int, *names: str) -> None:
    for name in names:
        if not getattr(run, name) >= least:
            raise UserError(f"{name} {getattr(run, name)}; allowed: {least} or more")


@dataclass(frozen=True)
class TrainRun(LoopSettings):
    """Train one model. The run ends at the first of its budgets: tokens, minutes, or a validation loss."""

    out: str = "runs/train"
    """folder for checkpoints, logs, the result and the report"""
    seed: int = 0
    """seed of the model's initial weights"""
    learning_rate: float = 3e-3
    """peak learning rate"""
    tokens: int = 8_192_000
    """tokens to train on"""
    minutes: float | None = None
    """stop after this many minutes of training steps; the schedule then follows the clock where it is
    ahead
    """
    until_loss: float | None = None
    """stop at the first evaluation at or below this many bits per byte"""
    data_fraction: float = 1.0
    """share of the training documents to use (the rest is never seen)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "tokens")
        require_seed(self, "seed")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate {self.learning_rate}; allowed: above 0")
        if not 0 < self.data_fraction <= 1:
            raise UserError(f"data_fraction {self.data_fraction}; allowed: above 0, up to 1")
        for name in ("minutes", "until_loss"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} {value}; allowed: above 0, or none")
