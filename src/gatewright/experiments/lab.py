"""A small decoder under many routers: one arm is one router with its losses; all else is equal.

Every arm sees the same tokens in the same order, starts from the same seed and takes the same steps. A
finished arm is kept as a file, so that a stopped experiment goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.backbones import Decoder, LanguageModel, initialise
from gatewright.data import Corpus, open_corpus
from gatewright.evaluation import bits_per_byte, take_bytes
from gatewright.experiments.steps import Stepper, step_time_ratio
from gatewright.parts import MLP, Capacity, MoELayer, build_router, router_info
from gatewright.training.checkpoint import write_atomic
from gatewright.training.runlog import Progress

Record = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One router with its losses. `router` None is the dense twin: one MLP of `expert_width`.

    `losses`: weight of each loss, by the names of `gatewright.parts.LOSSES`. `options` are the rule's own.
    """

    name: str
    router: str | None = "token_choice"
    num_experts: int = 16
    num_selected: int = 2
    expert_width: int = 128
    losses: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    capacity: Capacity | None = None
    note: str = ""
    num_shared_experts: int = 0


@dataclass(frozen=True)
class Plan:
    """What all arms share. `steps` optimizer steps of `rows` sequences of `context` tokens."""

    arms: tuple[Arm, ...]
    baseline: str
    width: int = 64
    num_layers: int = 2
    num_heads: int = 2
    context: int = 256
    rows: int = 16
    steps: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rate: float = 3e-3
    warmup_steps: int = 32
    weight_decay: float = 0.1
    eval_bytes: int = 131_072
    timing_rounds: int = 11

    def arm(self, name: str) -> Arm:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def build(plan: Plan, arm: Arm, vocab_size: int, seed: int) -> Decoder:
    """Return the decoder of one arm, freshly initialised."""
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for _ in range(plan.num_layers):
        if arm.router is None:
            layers.append(MLP(plan.width, arm.expert_width))
            continue
        options = dict(arm.options)
        router = build_router(arm.router, plan.width, arm.num_experts, arm.num_selected, **options)
        layers.append(
            MoELayer(
                plan.width,
                arm.num_experts,
                arm.num_selected,
                arm.expert_width,
                router=router,
                capacity=arm.capacity,
                num_shared_experts=arm.num_shared_experts,
            )
        )
    model = Decoder(vocab_size, plan.width, plan.num_heads, layers, context=plan.context)
    return initialise.fan_in(model, embedding_std=plan.width**-0.5)  # type: ignore[return-value]


def run_plan(plan: Plan, work: Path, about: str) -> Record:
    """Return {"schema", "plan", "arms": {name: {"seeds": [...], "step_time": ...}}}: every arm and seed."""
    work.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Record] = {arm.name: {**_plain(arm), **_facts(arm), "seeds": []} for arm in plan.arms}
    with Progress(about) as progress:
        corpus = open_corpus((), progress=progress.say)
        jobs = [(seed, arm) for seed in plan.seeds for arm in plan.arms]
        for place, (seed, arm) in enumerate(jobs):
            progress.update(place / len(jobs), f"{arm.name}, seed {seed} ({place + 1} of {len(jobs)})")
            settings = {"arm": _plain(arm), "seed": seed, "plan": _shared(plan), "text": corpus.fingerprint}
            path = work / f"{arm.name}-{seed}.json".replace("/", "-")
            done = kept(path, settings, partial(train, plan, arm, corpus, seed))
            arms[arm.name]["seeds"].append(done)
        for arm in plan.arms:
            progress.update(1.0, f"step time of {arm.name}")
            settings = {"arm": _plain(arm), "plan": _shared(plan), "baseline": plan.baseline}
            path = work / f"{arm.name}-time.json".replace("/", "-")
            arms[arm.name]["step_time"] = kept(path, settings, partial(_times, plan, arm, corpus))
            arms[arm.name]["active_flops"] = _active_flops(plan, arm, arms[arm.name]["seeds"])
    return {
        "schema": "gatewright.arms.v1",
        "plan": _shared(plan),
        "baseline": plan.baseline,
        "data": {"text": corpus.fingerprint},
        "arms": arms,
    }


def _plain(arm: Arm) -> Record:
    """Return an arm as plain data."""
    told: Record = json.loads(json.dumps(asdict(arm), default=str))
    # Arms that were kept or recorded before there were shared experts stay what they are.
    return {key: value for key, value in told.items() if key != "num_shared_experts" or value}


def _facts(arm: Arm) -> Record:
    """Return what a reader must know of the rule: whether its evaluation keeps from later tokens."""
    if arm.router is None:
        return {"causal": True}
    own = build_router(arm.router, 8, arm.num_experts, arm.num_selected, **arm.options).capacity
    # Capacity by rank is what looks ahead; an arm that counts by position has put another in its place.
    replaced = own is not None and arm.capacity is not None and arm.capacity.order == "position"
    return {"causal": replaced or router_info(arm.router).causal_at_inference}


def _active_flops(plan: Plan, arm: Arm, seeds: list[Record]) -> float:
    """Return the FLOPs of a layer's experts per token in training, forward, as they were computed."""
    computed = [own["training"]["experts_per_token"] for own in seeds if "training" in own]
    per_token = sum(computed) / len(computed) if computed else 1.0
    per_token += arm.num_shared_experts
    return 2.0 * 3 * plan.width * arm.expert_width * per_token


def _shared(plan: Plan) -> Record:
    """Return what all arms of a plan share, as plain data."""
    return {k: v for k, v in json.loads(json.dumps(asdict(plan), default=str)).items() if k != "arms"}


def kept(path: Path, settings: Record, work: Callable[[], Record]) -> Record:
    """Return the record at `path` if it is of these settings, else do the work and keep it."""
    settings = {k: v for k, v in settings.items() if v is not None}
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["settings"] == json.loads(json.dumps(settings)):
            return held["record"]
    record = work()
    write_atomic(path, json.dumps({"settings": settings, "record": record}, indent=1))
    return record


def _stepper(plan: Plan, arm: Arm, corpus: Corpus, seed: int) -> Stepper:
    """Return what trains one arm."""
    model = build(plan, arm, corpus.tokenizer.vocab_size, seed)
    stream = corpus.stream(plan.rows, plan.context, seed=0)
    return Stepper(model, stream, plan, arm.losses, seed)


def train(plan: Plan, arm: Arm, corpus: Corpus, seed: int) -> Record:
    """Return what one arm came to with one seed: quality, balance and drops."""
    stepper = _stepper(plan, arm, corpus, seed)
    curve, late = [], []
    for step in range(plan.steps):
        loss, counted = stepper.advance()
        if not math.isfinite(loss):
            return {"seed": seed, "diverged_at": step + 1, "valid_bpb": None}
        if (step + 1) % max(plan.steps // 20, 1) == 0:
            curve.append({"step": step + 1, "loss": loss})
        if step >= plan.steps * 4 // 5:
            late.append(counted)
    lengths = corpus.tokenizer.byte_lengths
    share = max(1, plan.eval_bytes // len(corpus.domains))
    texts = {d: take_bytes(corpus.valid(d).tokens, lengths, share) for d in corpus.domains}
    bits = bits_per_byte(stepper.model, texts, lengths, context=plan.context, batch_size=plan.rows)
    record: Record = {
        "seed": seed,
        "valid_bpb": bits.bits_per_byte,
        "num_bytes": bits.num_bytes,
        "curve": curve,
    }
    if arm.router is not None:
        windows = _windows(texts, plan)
        record |= {"training": balance_of(late), "validation": balance_of([_counted(stepper.model, windows)])}
    return record


def _windows(texts: Mapping[str, Any], plan: Plan) -> Iterator[Tensor]:
    """Yield [rows, context] batches of whole windows, the domains mixed evenly."""
    rows = []
    for tokens in texts.values():
        flat = torch.as_tensor(tokens, dtype=torch.int64)
        rows.append(flat[: len(flat) // plan.context * plan.context].view(-1, plan.context))
    fewest = min(len(own) for own in rows)
    mixed = torch.stack([own[:fewest] for own in rows], dim=1).flatten(0, 1)
    yield from mixed[: len(mixed) // plan.rows * plan.rows].split(plan.rows)


@torch.no_grad()
def _counted(model: LanguageModel, windows: Iterator[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return each router's counts over validation text, in evaluation mode."""
    total: dict[str, dict[str, Tensor]] = {}
    model.eval()
    for window in windows:
        for name, record in model(window).stats.items():
            own = {key: getattr(record, key) for key in ("counts", "kept", "tokens", "unrouted")}
            held = total.get(name)
            total[name] = own if held is None else {k: held[k] + v for k, v in own.items()}
    model.train()
    return total


def balance_of(steps: list[dict[str, dict[str, Tensor]]]) -> Record:
    """Return how even the load was: means over routers, and over steps where there are several.

    `max_violation` (max load - mean) / mean (Loss-Free Balancing, eq 4); `dropped` share of assignments;
    `unrouted` share of tokens; `experts_per_token` computed; `dead` experts with less than a tenth of an
    even share over all the steps.
    """
    violations, dropped, unrouted, active, dead = [], [], [], [], []
    for name in steps[0]:
        summed = sum((step[name]["counts"] for step in steps[1:]), steps[0][name]["counts"]).double()
        even = summed.sum() / summed.shape[0]
        dead.append(int((summed < even / 10).sum()))
        for step in steps:
            own = {key: value.double() for key, value in step[name].items()}
            mean = own["counts"].mean().clamp(min=1e-9)
            violations.append(float((own["counts"].max() - mean) / mean))
            made, tokens = own["counts"].sum().clamp(min=1), own["tokens"].clamp(min=1)
            dropped.append(float(1 - own["kept"].sum() / made))
            unrouted.append(float(own["unrouted"] / tokens))
            active.append(float(own["kept"].sum() / tokens))

    def mean_of(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "max_violation": mean_of(violations),
        "dropped": mean_of(dropped),
        "unrouted": mean_of(unrouted),
        "experts_per_token": mean_of(active),
        "dead": dead,
    }


def _times(plan: Plan, arm: Arm, corpus: Corpus) -> Record:
    """Return the step time of an arm over the baseline's, from alternating steps of both."""
    sides = [_stepper(plan, own, corpus, 0) for own in (plan.arm(plan.baseline), arm)]
    return step_time_ratio(sides[0], sides[1], plan.timing_rounds)
