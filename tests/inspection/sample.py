"""A made-up result for the tests of the report. Its numbers come from formulas: no model was trained."""

from __future__ import annotations

from typing import Any

import numpy as np

DOMAINS = ["scripture", "drama", "legal", "python", "technical"]
TEXT = "In the beginning <script>alert('x')</script> & def f(x):\n\treturn x + 1  # the end\n"


def _curve(final: float, tokens: int, flops: float, seconds: float, points: int = 24) -> list[dict[str, Any]]:
    rows = []
    for step in np.linspace(0, 1, points):
        loss = final + 6.0 * np.exp(-26 * step) + 0.35 * (1 - step) ** 1.5 * (step > 0)
        rows.append(
            {
                "step": int(1000 * step),
                "tokens": int(tokens * step),
                "train_flops": flops * step,
                "seconds": seconds * step,
                "valid_bpb": float(loss),
                "valid_bpb_ema": None,
                "domains": {name: float(loss + 0.1 * index) for index, name in enumerate(DOMAINS)},
                "learning_rate": 0.003,
            }
        )
    return rows


def side(
    name: str,
    kind: str,
    final: float,
    *,
    tokens: int = 6_000_000,
    seconds: float = 100.0,
    experts: int = 64,
    chosen: int = 4,
    routers: int = 3,
    drops: bool = True,
    length: int = 420,
    points: int = 24,
    seed: int = 0,
) -> dict[str, Any]:
    """Return one made-up side; sparse ones carry routing for `routers` layers."""
    draw = np.random.default_rng(seed)
    flops = tokens * 3.1e6
    by_domain = {
        domain: final + 0.12 * (index - 2) + 0.01 * draw.normal() for index, domain in enumerate(DOMAINS)
    }
    curve = _curve(final, tokens, flops, seconds, points)
    side: dict[str, Any] = {
        "name": name, "kind": kind, "label": f"{name} ({kind})", "paper": "olmoe",
        "settings": {"width": 64, "num_layers": routers, "attention": {"num_heads": 4, "qk_norm": True}},
        "total_parameters": 3_456_789 if kind == "sparse" else 812_345, "active_parameters": 801_234,
        "forward_flops_per_token": 1.03e6, "train_flops_per_token": 3.1e6, "learning_rate": 0.006,
        "token_budget": tokens, "steps": 1000, "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "curve": curve,
        "train_log": [
            {"step": s, "tokens": s * tokens // 1000,
             "loss": 1.3 + 4 * float(np.exp(-s / 60)) + 0.05 * draw.normal(), "learning_rate": 0.006,
             "seconds": s * seconds / 1000}
            for s in range(0, 1001, 120 // points)
        ],
        "final": {"valid_bpb": final, "domains": by_domain, "tokens": tokens, "train_flops": flops,
                  "seconds": seconds},
        "routers": [],
    }  # fmt: skip
    if kind == "sparse":
        steps = [row["step"] for row in curve]
        side |= _routing(draw, steps, experts, chosen, routers, drops, list((TEXT * 20)[:length]))
    return side


def _routing(
    draw: np.random.Generator,
    steps: list[int],
    experts: int,
    chosen: int,
    routers: int,
    drops: bool,
    pieces: list[str],
) -> dict[str, Any]:
    names = [f"layers.{index}" for index in range(routers)]
    load, special, view = {}, {}, {}
    for index, router in enumerate(names):
        pull = draw.normal(size=experts)
        shares = [np.exp(pull * np.exp(-step / 250)) for step in steps]
        load[router] = [(share / share.sum()).tolist() for share in shares]
        logits = draw.normal(size=(len(DOMAINS), experts)) * (0.4 + 0.5 * index)
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) * chosen
        special[router] = np.minimum(share, 1).tolist()
    for router in names:
        ids = np.stack([draw.permutation(experts)[:chosen] for _ in pieces])
        ids = np.where(
            np.array([ord(p) % 3 == 0 for p in pieces])[:, None], (ids[0] + np.arange(chosen)) % experts, ids
        )
        weights = -np.sort(-draw.dirichlet(np.ones(chosen), size=len(pieces)), axis=1)
        view[router] = {"experts": ids.tolist(), "weights": weights.tolist()}
    lost = [0.12 * float(np.exp(-step / 200)) if drops else 0.0 for step in steps]
    return {
        "routers": names,
        "load_over_time": {"steps": steps, "routers": load},
        "dropped_over_time": {
            "steps": steps, "routers": {n: [v / (i + 1) for v in lost] for i, n in enumerate(names)}
        },
        "specialisation": {
            "domains": DOMAINS, "chance": chosen / experts, "num_selected": chosen, "routers": special
        },
        "token_view": [
            {"domain": "scripture", "pieces": pieces, "routers": view},
            {"domain": "python", "pieces": pieces[::-1], "routers": view},
        ],
    }  # fmt: skip


def race(gap: float = 0.021, seeds: int = 3, experts: int = 64, **options: Any) -> dict[str, Any]:
    """Return a made-up race whose gap is `gap` on average, with a spread of 0.004 over seeds."""
    runs, comparisons = [], []
    for seed in range(seeds):
        dense = 1.93 + 0.003 * seed
        here = gap + 0.002 * (seed - (seeds - 1) / 2)
        sides = [
            side(
                "sparse",
                "sparse",
                dense - here,
                tokens=4_800_000,
                seconds=130.0,
                experts=experts,
                seed=seed,
                **options,
            ),
            side("dense", "dense", dense, seconds=96.0, seed=seed + 9),
        ]
        runs.append({"seed": seed, "sides": sides})
        ahead = here > 0
        comparisons.append(
            {
                "seed": seed, "sparse": "sparse", "dense": "dense", "against": "active", "gap_bpb": here,
                "token_share": 0.8, "flop_share": 0.802, "second_share": 1.35,
                "speedup": {"tokens": 1.33, "flops": 1.32, "seconds": 0.78} if ahead
                else {"tokens": None, "flops": None, "seconds": None},
                "step_time_ratio": {"median": 1.69, "low": 1.52, "high": 1.9}, "held": ahead,
            }
        )  # fmt: skip
    width = 0.002 * (seeds - 1) if seeds > 1 else None
    held = gap > (width or 0)
    return {
        "schema": "gatewright.race.v1", "title": "OLMoE against its dense twin (made-up numbers)",
        "command": "gatewright race olmoe --seeds 3", "created": "2000-01-01T00:00:00Z",
        "environment": {"gatewright": "0.0", "torch": "0.0", "python": "3", "threads": 2, "processor": "none",
                        "device": "cpu", "commit": None},
        "data": {"name": "made-up", "domains": DOMAINS, "train_bytes": 26_000_000, "valid_bytes": 512_000,
                 "tokenizer": "bytes", "context": 256, "batch_tokens": 4096},
        "runs": runs, "comparisons": comparisons,
        "verdict": {"sentence": "", "held": held, "gap_mean": gap, "gap_spread": width},
        "scaling": None, "small_data": None, "triangle": None,
    }  # fmt: skip


def full_race(**options: Any) -> dict[str, Any]:
    """Return a made-up race with every optional part."""
    result = race(**options)
    result["scaling"] = [
        {"num_experts": e, "total_parameters": 4e5 * e, "valid_bpb": 2.0 - 0.02 * i + 0.004 * s, "seed": s}
        for i, e in enumerate([2, 4, 8, 16, 32, 64]) for s in range(2)
    ]  # fmt: skip
    result["small_data"] = [
        {"fraction": f, "kind": kind, "seed": 0,
         "valid_bpb": 2.4 - 0.4 * i + (0.05 if kind == "sparse" and i == 0 else 0)}
        for i, f in enumerate([0.01, 0.1, 1.0]) for kind in ("sparse", "dense")
    ]  # fmt: skip
    result["triangle"] = {
        "claims": [
            {"claim": "Better than dense at equal compute", "held": True, "detail": "1.909 against 1.930"},
            {"claim": "As good as dense at equal size", "held": False, "detail": "1.909 against 1.871"},
        ],
        "points": [
            {"name": "sparse", "valid_bpb": 1.909, "train_flops": 1.5e13, "total_parameters": 3.4e6,
             "active_parameters": 8e5, "seconds": 130},
            {"name": "dense", "valid_bpb": 1.93, "train_flops": 1.86e13, "total_parameters": 8.1e5,
             "active_parameters": 8e5, "seconds": 96},
            {"name": "dense-total", "valid_bpb": 1.871, "train_flops": 6.2e13, "total_parameters": 3.4e6,
             "active_parameters": 3.4e6, "seconds": 310},
        ],
    }  # fmt: skip
    return result


def training(**options: Any) -> dict[str, Any]:
    """Return a made-up training run of one sparse side."""
    result = race(seeds=1, **options)
    for key in ("comparisons", "verdict", "scaling", "small_data", "triangle"):
        del result[key]
    result |= {"schema": "gatewright.train.v1", "title": "A made-up run", "command": "gatewright train olmoe"}
    result["runs"][0]["sides"] = result["runs"][0]["sides"][:1]
    return result
