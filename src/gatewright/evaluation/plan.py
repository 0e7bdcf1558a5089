"""What a model would weigh, cost and need, from its settings alone: nothing is allocated."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewright.backbones import Cost, EncoderDecoder, count_cost, on_no_memory
from gatewright.errors import UserError, did_you_mean
from gatewright.evaluation.memory import (
    BYTES_PER_WEIGHT,
    OPTIMIZERS,
    TRAINED_DTYPES,
    TrainingMemory,
    cache_bytes,
    check_choice,
    training_memory,
)
from gatewright.papers import (
    all_papers,
    get_trained_paper,
    published,
    published_names,
    text_papers,
    trained_papers,
)
from gatewright.papers.settings_table import settings_of

GB = 1e9
# What of a device's memory may be filled; the rest is for kernels, buffers and fragments.
USABLE_SHARE = 0.9
DEVICE_SIZES_GB = (24.0, 80.0, 141.0)


@dataclass(frozen=True)
class Plan:
    """A model's size, cost and memory. GB are 1e9 bytes; FLOPs count a multiply-add as 2."""

    name: str
    paper: str
    settings: dict[str, Any]
    dtype: str
    context: int
    batch: int
    optimizer: str
    recompute: str
    """blocks: the total counts what is kept where activations inside blocks are computed again"""
    total_parameters: int
    active_parameters: int
    inner_parameters: int
    """without embedding and output matrix, as the tables of 2017 count"""
    inner_operations: float
    """multiply-adds per token without those two; of hierarchical gates, the groups that a token chooses"""
    forward_flops_per_token: float
    train_flops_per_token: float
    flops_by_part: dict[str, float]
    """forward FLOPs per token"""
    attention_share: float
    """share of the forward FLOPs in attention, projections included"""
    weights_gb: dict[str, float]
    kv_cache_gb: float
    """of `batch` sequences of `context` tokens; of an LSTM its state"""
    inference_gb: float
    """weights in `dtype` and the KV cache"""
    training_gb: dict[str, float] | None
    """weights, gradients, optimizer, activations, total; activations_recomputed is the smaller alternative"""
    devices: tuple[dict[str, float | int | None], ...]
    """memory_gb, and how many such devices hold the model for inference and for training"""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for JSON."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return the plan as lines of text."""
        return "\n".join(_lines(self))


def plan(
    name: str | None = None,
    *,
    settings: Any = None,
    paper: str | None = None,
    dtype: str = "bf16",
    context: int | None = None,
    batch: int = 1,
    device_memory_gb: float | None = None,
    optimizer: str = "adamw",
    recompute: str = "none",
) -> Plan:
    """Return the Plan of a model, built on the meta device.

    Args: `name` is a published size ("mixtral-8x7b"), a paper id (its small default), a run's folder or
    run.toml; or give a paper's `settings`, or `paper` alone. `dtype` (fp32, bf16, int8, int4): the weights';
    activations and cache share fp32 and bf16, else take bf16. Defaults: `context` the settings' own,
    `device_memory_gb` a few common sizes. Raises: UserError for unknown words and for numbers below 1.
    """
    check_choice("dtype", dtype, tuple(BYTES_PER_WEIGHT))
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    again = check_choice("recompute", recompute, ("none", "blocks")) == "blocks"
    title, paper_id, chosen = _resolve(name, settings, paper)
    length = chosen.context if context is None else context
    _check_numbers(length, batch, device_memory_gb)
    model, cost = _model_and_cost(paper_id, chosen, length)
    total, each = cost.total_parameters, BYTES_PER_WEIGHT[dtype]
    counted = dtype in TRAINED_DTYPES and not isinstance(model, EncoderDecoder)
    trained = training_memory(model, dtype, length, batch, optimizer) if counted else None
    cache = cache_bytes(model, max(each, 2.0), length) * batch
    inference = each * total + cache
    attention = cost.flops["attention_projections"] + cost.flops["attention_scores"]
    sizes = DEVICE_SIZES_GB if device_memory_gb is None else (float(device_memory_gb),)
    return Plan(
        name=title,
        paper=paper_id,
        settings=dataclasses.asdict(chosen),
        dtype=dtype,
        context=length,
        batch=batch,
        optimizer=optimizer,
        recompute=recompute,
        total_parameters=total,
        active_parameters=cost.active_parameters,
        inner_parameters=cost.inner_parameters,
        inner_operations=cost.inner_operations,
        forward_flops_per_token=cost.forward_flops_per_token,
        train_flops_per_token=cost.train_flops_per_token,
        flops_by_part=dict(cost.flops),
        attention_share=attention / cost.forward_flops_per_token,
        weights_gb={kind: size * total / GB for kind, size in BYTES_PER_WEIGHT.items()},
        kv_cache_gb=cache / GB,
        inference_gb=inference / GB,
        training_gb=None if trained is None else _in_gb(trained, again),
        devices=tuple(
            _devices(size, inference, None if trained is None else trained.total_of(again)) for size in sizes
        ),
        notes=_pair_notes() if isinstance(model, EncoderDecoder) else _notes(dtype, length, chosen.context),
    )


def _model_and_cost(paper_id: str, settings: Any, context: int) -> tuple[Any, Cost]:
    """Return the model as shapes and its cost; an encoder-decoder is built for this context."""
    if paper_id not in text_papers():
        settings = dataclasses.replace(settings, context=context)
    with on_no_memory():
        model = get_trained_paper(paper_id).build(settings)
    return model, count_cost(model, context)


def _check_numbers(context: int, batch: int, device_memory_gb: float | None) -> None:
    for what, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise UserError(f"{what} {value}; allowed: 1 or more")
    if device_memory_gb is not None and not device_memory_gb > 0:
        raise UserError(f"device_memory_gb {device_memory_gb}; allowed: above 0; give one device's memory")


def _in_gb(trained: TrainingMemory, recompute: bool) -> dict[str, float]:
    own = dataclasses.asdict(trained)
    own["activations_recomputed"] = own.pop("recomputed")
    return {key: value / GB for key, value in (*own.items(), ("total", trained.total_of(recompute)))}


def _devices(size_gb: float, inference: float, training: float | None) -> dict[str, float | int | None]:
    usable = size_gb * GB * USABLE_SHARE
    return {
        "memory_gb": size_gb,
        "inference": math.ceil(inference / usable),
        "training": None if training is None else math.ceil(training / usable),
    }


def _notes(dtype: str, context: int, trained_context: int) -> tuple[str, ...]:
    notes = [
        "GB are 1e9 bytes; attention's FLOPs: a causal token meets half of this context on average",
        "inference: weights and KV cache; the passing activations of a long prompt come on top",
        f"devices: everything sharded evenly, {USABLE_SHARE:.0%} of each filled, no communication buffers",
        "activations: all that backward needs, with fused attention; batch is what the devices hold together",
    ]
    if dtype == "bf16":
        notes.append("training in bf16 keeps an fp32 master copy of the weights, counted with the optimizer")
    if dtype not in TRAINED_DTYPES:
        notes.append(f"{dtype}: weights without their scales; the KV cache in bf16; no training figures")
    if context > trained_context:
        notes.append(f"the settings' own context is {trained_context}; a model so built refuses longer texts")
    return tuple(notes)


def _pair_notes() -> tuple[str, ...]:
    return (
        "GB are 1e9 bytes; a token is one of the text: sources and targets are what masking makes of it",
        "inference: weights, and keys and values of source and target",
        f"devices: everything sharded evenly, {USABLE_SHARE:.0%} of each filled, no communication buffers",
        "no training figures: the activations of encoder-decoders are not counted yet",
    )


def _resolve(name: str | None, settings: Any, paper: str | None) -> tuple[str, str, Any]:
    """Return (title, paper id, Settings) from whichever way the model was named."""
    if settings is not None:
        paper_id = paper or type(settings).__module__.rpartition(".")[2]
        if not isinstance(settings, get_trained_paper(paper_id).Settings):
            raise UserError(f"settings are not those of paper {paper_id!r}; give the paper they belong to")
        return name or paper_id, paper_id, settings
    if name is None:
        if paper is None:
            raise UserError(
                "no model given; allowed: a published size, a paper id or a run's folder; name one"
            )
        name = paper
    if name in published_names():
        return name, *published(name)
    if name in (*trained_papers(), *(info.id for info in all_papers())):
        return f"{name} (small default)", name, get_trained_paper(name).Settings()
    path = Path(name)
    if path.is_dir() or path.suffix == ".toml":
        return _from_run(path / "run.toml" if path.is_dir() else path)
    known = (*published_names(), *trained_papers())
    raise UserError(
        f"model {name!r} is unknown{did_you_mean(name, known)}; allowed: {', '.join(known)}, "
        "or a run's folder"
    )


def _from_run(path: Path) -> tuple[str, str, Any]:
    """Read paper and settings from a run.toml's tables [run] and [model]; what is left out is the default."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; give the folder of a run, which holds its run.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from None
    run, model = _table(tables, "run", path), _table(tables, "model", path)
    paper_id = str(run.get("paper") or tables.get("paper") or "mixtral")
    kind = get_trained_paper(paper_id).Settings
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in model:
        if key not in fields:
            raise UserError(
                f"{path}: [model] has {key!r}{did_you_mean(key, fields)}; allowed: {', '.join(fields)}"
            )
    return str(path.parent), paper_id, settings_of(kind, model)


def _table(tables: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name} is no table; allowed: [run] and [model] as a run writes them")
    return table


def _lines(p: Plan) -> list[str]:
    weights = " · ".join(f"{kind} {_gb(size)}" for kind, size in p.weights_gb.items())
    head = [
        p.name,
        f"  parameters   total {p.total_parameters:,} · active {p.active_parameters:,}",
        f"  inside       parameters {p.inner_parameters:,} · multiply-adds per token "
        f"{p.inner_operations:,.0f} (without embedding and output matrix)",
        f"  FLOPs/token  forward {p.forward_flops_per_token:.4g} · training {p.train_flops_per_token:.4g}"
        f" (context {p.context})",
    ]
    for part, flops in sorted(p.flops_by_part.items(), key=lambda item: -item[1]):
        if flops:
            head.append(f"    {part:<22} {flops:.4g}  {flops / p.forward_flops_per_token:6.1%}")
    head += [
        f"  attention    {p.attention_share:.1%} of the forward FLOPs",
        f"  weights      {weights}",
        f"  KV cache     {_gb(p.kv_cache_gb)} for {p.batch} x {p.context} tokens",
        f"  inference    {_gb(p.inference_gb)} in {p.dtype}",
    ]
    if p.training_gb is not None:
        t = p.training_gb
        parts = [("activations", "if kept"), ("activations_recomputed", "if recomputed")]
        (counted, _), (other, how) = parts if p.recompute == "none" else reversed(parts)
        head += [
            f"  training     {_gb(t['total'])}: weights {_gb(t['weights'])}, "
            f"gradients {_gb(t['gradients'])}, "
            f"{p.optimizer} {_gb(t['optimizer'])}, activations {_gb(t[counted])} "
            f"({_gb(t[other])} {how})",
        ]
    for device in p.devices:
        training = "" if device["training"] is None else f" · training {device['training']}"
        head.append(
            f"  devices      of {device['memory_gb']:g} GB: inference {device['inference']}{training}"
        )
    return head + [f"  {note}" for note in p.notes]


def _gb(value: float) -> str:
    return f"{value:,.1f} GB" if value >= 1 else f"{value * 1000:,.3g} MB"
