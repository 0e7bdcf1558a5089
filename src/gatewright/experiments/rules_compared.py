"""routers/compare: every rule in the same decoder at equal active FLOPs, on the default corpus."""

from __future__ import annotations

from pathlib import Path

from gatewright.experiments.arms import run_arms
from gatewright.experiments.lab import Arm, Plan, Record
from gatewright.experiments.lab_pages import ranked

_BALANCE = {"balance": 1e-2}
# Ten times the papers' 0.001: a bias must move within hundreds of steps here.
_FAST_BIAS = {"rate": 1e-2}
_NOISY = {"importance": 0.1, "load": 0.1}
# Expert rows that one token meets: K experts of width F, K F = 256 for all.
_ACTIVE = 256


def _one(name: str, router: str, **more: object) -> Arm:
    """Return an arm of one expert per token, twice as wide and half as many."""
    return Arm(name, router, 8, 1, _ACTIVE, **more)  # type: ignore[arg-type]


ARMS = (
    Arm("dense twin", None, 1, 1, _ACTIVE, note="one MLP of the same active width"),
    Arm("token_choice", "token_choice", losses=_BALANCE, note="softmax, renormalised (Mixtral)"),
    Arm("token_choice_raw", "token_choice_raw", losses={"balance": 1e-2, "z": 1e-3}, note="OLMoE"),
    Arm(
        "dense mixture",
        "dense",
        16,
        16,
        _ACTIVE // 16,
        note="all 16, a sixteenth each (1991)",
    ),
    _one("switch", "switch", losses=_BALANCE),
    Arm("gshard", "gshard", losses={"gshard": 1e-2}),
    Arm("st_moe", "st_moe", losses={"balance": 1e-2, "z": 1e-3}),
    Arm("noisy_top_k", "noisy_top_k", losses=_NOISY, note="2017"),
    Arm("vmoe", "vmoe", losses={"importance": 5e-3, "load": 5e-3}),
    Arm("sampled", "sampled", losses=_BALANCE),
    Arm("expert_choice", "expert_choice", note="sees the future: its figure is no language model's"),
    Arm("batchwise", "batchwise", losses={"threshold": 1e-2}, note="2017 appendix F"),
    Arm("deepseek_moe", "deepseek_moe", losses=_BALANCE),
    Arm("deepseek_v2", "deepseek_v2", losses=_BALANCE, options={"num_groups": 4, "groups_kept": 2}),
    Arm("deepseek_v3", "deepseek_v3", losses={"sequence_balance": 1e-4}, options=_FAST_BIAS),
    Arm("deepseek_v4", "deepseek_v4", losses={"sequence_balance": 1e-4}, options=_FAST_BIAS),
    Arm("loss_free", "loss_free", options=_FAST_BIAS),
    _one("sinkhorn", "sinkhorn"),
    _one("base", "base"),
    _one("hash", "hash"),
    Arm("remoe", "remoe", losses={"relu": 1.0}, note="experts per token as its penalty leaves them"),
    _one("llama4", "llama4", losses=_BALANCE),
    Arm("gpt_oss", "gpt_oss", losses=_BALANCE),
    _one("cosine", "cosine", losses={"cosine": 1e-2}),
    Arm("top_p", "top_p", losses={"balance": 1e-2, "entropy": 1e-4}, note="experts per token vary"),
    Arm("hierarchical", "hierarchical", 32, 4, _ACTIVE // 4, losses=_NOISY, note="2017 appendix B"),
    Arm("mixture_of_depths", "mixture_of_depths", 1, 1, 8 * _ACTIVE, losses={"depth": 1e-2}),
)

PLAN = Plan(arms=ARMS, baseline="token_choice")
CLAIM = (
    "every causal rule but the dense mixture ends below the dense twin of equal active FLOPs in every seed"
)


def run_compare(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: one seed, an eighth of the steps."""
    title = "Every rule at equal active FLOPs"
    return run_arms(PLAN, work, quick, "routers/compare", title, CLAIM, _verdict)


def _verdict(record: Record) -> Record:
    """Return which arms beat the dense twin in every seed, and which did not."""
    twin = [own["valid_bpb"] for own in record["arms"]["dense twin"]["seeds"]]
    worse, gaps = [], {}
    for name, arm in record["arms"].items():
        if name in ("dense twin", "dense mixture"):
            continue
        values = [own["valid_bpb"] for own in arm["seeds"]]
        gaps[name] = [None if v is None else t - v for t, v in zip(twin, values, strict=True)]
        if arm["causal"] and not all(gap is not None and gap > 0 for gap in gaps[name]):
            worse.append(name)
    best = ranked(record)[0]
    return {
        "held": not worse,
        "gaps_bpb": gaps,
        "not_below_the_twin": worse,
        "sentence": (
            f"{'held' if not worse else 'did not hold'}: "
            + (f"not below the dense twin in every seed: {', '.join(worse)}; " if worse else "")
            + f"best causal rule on average: {best}"
        ),
    }
