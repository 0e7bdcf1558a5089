"""A small decoder under many routers: one arm is one router with its losses; all else is equal.

Every arm sees the same tokens in the same order, starts from the same seed and takes the same steps. A
finished arm is kept as a file, so that a stopped experiment goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gatewright.backbones import Decoder, LanguageModel, count_cost, initialise, on_no_memory
from gatewright.data import Corpus, open_corpus
from gatewright.evaluation import Bits, bits_per_byte, take_bytes
from gatewright.experiments.lab_counts import balance_of, counted_over, windows
from gatewright.experiments.steps import Stepper, step_time_ratio
from gatewright.parts import MLP, Capacity, MoELayer, build_router, router_info
from gatewright.training.checkpoint import write_atomic
from gatewright.training.precision import autocast, set_router_dtype
from gatewright.training.runlog import Progress

Record = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One router with its losses. `router` None is the dense twin: one MLP of `expert_width`.

    `losses`: weight of each loss, by the names of `gatewright.parts.LOSSES`. `options` are the rule's own.
    `init_scale` s draws every matrix with variance s / fan_in; `precision` and `router_dtype` are what the
    model and its routers compute in ("fp32", "bf16"). `learning_rate` is the arm's own; None: the plan's.
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
    init_scale: float = 1.0
    precision: str = "fp32"
    router_dtype: str = "fp32"
    learning_rate: float | None = None


@dataclass(frozen=True)
class Plan:
    """What all arms share. `steps` optimizer steps of `rows` sequences of `context` tokens.

    `evaluations` of the validation text, evenly along a run; `padded`: step times with every place of every
    expert computed, filled or not, as well.
    """

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
    evaluations: int = 1
    padded: bool = False
    quick_seeds: int = 1

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
    set_router_dtype(model, arm.router_dtype)
    return initialise.fan_in(model, arm.init_scale, plan.width**-0.5)  # type: ignore[return-value]


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
            if plan.padded:
                path = work / f"{arm.name}-padded-time.json".replace("/", "-")
                own = kept(path, settings, partial(_times, plan, arm, corpus, "padded"))
                arms[arm.name]["padded_step_time"] = own
            arms[arm.name]["active_flops"] = _active_flops(plan, arm, arms[arm.name]["seeds"])
            arms[arm.name]["cost"] = cost_of(plan, arm, corpus.tokenizer.vocab_size)
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
    return {key: value for key, value in told.items() if _says(key, value)}


# Fields that came later: what was kept or recorded without them stays what it is.
_LATER: Record = {"num_shared_experts": 0, "init_scale": 1.0, "precision": "fp32", "router_dtype": "fp32"}
_LATER |= {"evaluations": 1, "padded": False, "quick_seeds": 1, "learning_rate": None}


def _says(key: str, value: Any) -> bool:
    """Say whether a field is told: those that came later only where they are not what they were."""
    return key not in _LATER or value != _LATER[key]


def cost_of(plan: Plan, arm: Arm, vocab_size: int) -> Record:
    """Return an arm's parameters, and its forward FLOPs per token by part; "padded" is what one layer's
    experts cost with all E C places computed, filled or not.
    """
    with on_no_memory():
        model = build(plan, arm, vocab_size, 0)
    cost = count_cost(model, plan.context)
    record: Record = {"total_parameters": cost.total_parameters, "flops": cost.flops}
    if arm.capacity is not None:
        tokens = plan.rows * plan.context
        places = arm.capacity.places(arm.num_selected, tokens, arm.num_experts, True)
        share = arm.num_experts * places / tokens
        record["padded"] = 2.0 * 3 * plan.width * arm.expert_width * share
    return record


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
    told = json.loads(json.dumps(asdict(plan), default=str))
    return {k: v for k, v in told.items() if k != "arms" and _says(k, v)}


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


def stepper_of(plan: Plan, arm: Arm, corpus: Corpus, seed: int) -> Stepper:
    """Return what trains one arm."""
    model = build(plan, arm, corpus.tokenizer.vocab_size, seed)
    stream = corpus.stream(plan.rows, plan.context, seed=0)
    if arm.learning_rate is not None:
        plan = replace(plan, learning_rate=arm.learning_rate)
    return Stepper(model, stream, plan, arm.losses, seed, arm.precision)


def train(plan: Plan, arm: Arm, corpus: Corpus, seed: int) -> Record:
    """Return what one arm came to with one seed: quality, balance and drops."""
    stepper = stepper_of(plan, arm, corpus, seed)
    texts, curve, late = _texts(plan, corpus), [], []
    path: list[Record] = []
    every = max(plan.steps // plan.evaluations, 1)
    for step in range(plan.steps):
        loss, counted = stepper.advance()
        if not math.isfinite(loss):
            lost = {"seed": seed, "diverged_at": step + 1, "valid_bpb": None}
            return lost | ({"path": path} if plan.evaluations > 1 else {})
        if (step + 1) % max(plan.steps // 20, 1) == 0:
            curve.append({"step": step + 1, "loss": loss})
        if step >= plan.steps * 4 // 5:
            late.append(counted)
        if plan.evaluations > 1 and (step + 1) % every == 0 and step + 1 < plan.steps:
            own = _bits(plan, arm, corpus, stepper.model, texts)
            path.append({"step": step + 1, "valid_bpb": own.bits_per_byte})
    bits = _bits(plan, arm, corpus, stepper.model, texts)
    record: Record = {
        "seed": seed,
        "valid_bpb": bits.bits_per_byte,
        "num_bytes": bits.num_bytes,
        "curve": curve,
    }
    if plan.evaluations > 1:
        record["path"] = [*path, {"step": plan.steps, "valid_bpb": bits.bits_per_byte}]
    if arm.router is not None:
        shown = windows(texts, plan.rows, plan.context)
        counts = counted_over(stepper.model, shown)
        record |= {"training": balance_of(late), "validation": balance_of([counts])}
    return record


def _texts(plan: Plan, corpus: Corpus) -> dict[str, Any]:
    """Return the validation text, the domains in equal shares."""
    share = max(1, plan.eval_bytes // len(corpus.domains))
    lengths = corpus.tokenizer.byte_lengths
    return {d: take_bytes(corpus.valid(d).tokens, lengths, share) for d in corpus.domains}


def _bits(plan: Plan, arm: Arm, corpus: Corpus, model: LanguageModel, texts: Mapping[str, Any]) -> Bits:
    """Return the quality of a model as it stands, in its own precision."""
    return bits_per_byte(
        model,
        texts,
        corpus.tokenizer.byte_lengths,
        context=plan.context,
        batch_size=plan.rows,
        autocast=autocast(arm.precision, torch.device("cpu")),
    )


def _times(plan: Plan, arm: Arm, corpus: Corpus, backend: str | None = None) -> Record:
    """Return the step time of an arm over the baseline's, from alternating steps of both."""
    sides = [stepper_of(plan, own, corpus, 0) for own in (plan.arm(plan.baseline), arm)]
    for layer in (part for side in sides for part in side.model.modules() if isinstance(part, MoELayer)):
        layer.backend = backend
    return step_time_ratio(sides[0], sides[1], plan.timing_rounds)
