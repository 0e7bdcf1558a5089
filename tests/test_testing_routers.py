"""gatewright.testing's routers: every rule passes with the toolkit's own parts, and wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import Assignment, RoutingCall, make_plan
from gatewright.parts.routing import select_top
from gatewright.parts.rules.base import Base
from gatewright.parts.rules.expert_choice import ExpertChoice
from gatewright.parts.rules.gpt_oss import LogitChoice
from gatewright.parts.rules.group_limited import GroupLimited
from gatewright.parts.rules.gshard import GShard
from gatewright.parts.rules.hash import HashRule
from gatewright.parts.rules.llama4 import SigmoidInput
from gatewright.parts.rules.sinkhorn import Sinkhorn
from gatewright.parts.rules.token_choice import TokenChoice
from gatewright.parts.rules.top_p import TopP
from gatewright.parts.scores import SCORES
from gatewright.parts.selection_bias import SelectionBias
from gatewright.testing import RULES, Mismatch, Report, check_router
from tests.noisy_routers import NOISY

Pair = tuple[Tensor, Tensor]


def seen(rule: Callable[..., Assignment], scores: str, **more: object) -> Callable[..., Assignment]:
    """Return a rule of the toolkit as a function of logits."""

    def choose(logits: Tensor, mask: Tensor | None = None) -> Assignment:
        return rule(logits, SCORES[scores](logits), RoutingCall(mask=mask, training=True, **more))

    return choose


def pair(found: Assignment) -> Pair:
    return found.experts, found.weights


def token_choice(form: str) -> Callable[..., Pair]:
    return lambda logits, k, **mask: pair(seen(TokenChoice(k, form), "softmax")(logits, **mask))


def limited(scores: str, group_score: str, form: str) -> Callable[..., Pair]:
    def choose(logits, k, bias=None, num_groups=1, groups_kept=1, scale=1.0, **mask):
        num_experts = logits.shape[1]
        learned = None
        if bias is not None:
            learned = SelectionBias(num_experts)
            learned.bias = bias
        rule = GroupLimited(
            num_experts, k, num_groups, groups_kept, group_score, form, scale=scale, bias=learned
        )
        return pair(seen(rule, scores)(logits, **mask))

    return choose


def gshard(logits, k, coins, capacity, mask=None) -> Pair:
    flip = "gatewright.parts.rules.threshold_second.later_choice_coins"
    with mock.patch(flip, return_value=coins.unsqueeze(-1)):
        found = seen(GShard(), "softmax")(logits, mask)
    slots = make_plan(found, capacity, order="rank").slots
    return torch.where(slots >= 0, found.experts, -1), found.weights


def expert_choice(logits, k, mask=None) -> Pair:
    found = seen(ExpertChoice(logits.shape[1], k), "softmax")(logits, mask)
    weights = logits.new_zeros(logits.shape)
    weights = weights.scatter_add(1, found.experts.clamp(min=0), found.weights)
    return torch.arange(logits.shape[0]).expand(logits.shape[1], -1), weights.T


def hashed(weights: str) -> Callable[..., Pair]:
    def choose(logits, k, table, token_ids, scale=1.0, mask=None):
        rule = HashRule(table, logits.shape[1], weights, scale)
        return pair(seen(rule, "sqrt_softplus", token_ids=token_ids)(logits, mask))

    return choose


RAW, SELECTED = token_choice("raw"), token_choice("softmax_selected")
OWN: dict[str, Callable[..., Pair]] = {
    **dict.fromkeys(("switch", "olmoe", "token_choice_raw", "deepseek_moe"), RAW),
    **dict.fromkeys(("mixtral", "qwen3", "token_choice"), SELECTED),
    "gpt_oss": lambda logits, k, **mask: pair(seen(LogitChoice(k), "identity")(logits, **mask)),
    "llama4": lambda logits, k, **mask: pair(seen(SigmoidInput(k), "sigmoid")(logits, **mask)),
    "loss_free": limited("sigmoid", "max", "raw"),
    "deepseek_v2": limited("softmax", "max", "raw"),
    "deepseek_v3": limited("sigmoid", "top2", "renormalised"),
    "deepseek_v4": limited("sqrt_softplus", "max", "renormalised"),
    "deepseek_v4_hash": hashed("learned"),
    "hash": hashed("uniform"),
    "gshard": gshard,
    "top_p": lambda logits, k, p, **mask: pair(seen(TopP(p, k), "softmax")(logits, **mask)),
    "expert_choice": expert_choice,
    "sinkhorn": lambda logits, k, **mask: pair(
        seen(Sinkhorn(logits.shape[1], k, 1e-6, 100), "sigmoid" if k == 1 else "softmax")(logits, **mask)
    ),
    "base": lambda logits, k, **mask: pair(seen(Base(), "sigmoid")(logits, **mask)),
    **NOISY,
}


def test_every_rule_is_tried():
    assert OWN.keys() == RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_the_toolkits_rules_pass(rule: str):
    found = check_router(OWN[rule], rule, padding=True)
    assert found.ok
    assert found.passed == found.cases > 5
    assert check_router(OWN[rule], rule, dtype=torch.float32).ok


def found_by(fn: Callable[..., Pair], rule: str, **options: object) -> Report:
    found = check_router(fn, rule, report=True, **options)  # type: ignore[arg-type]
    assert not found.ok
    return found


def by_topk(logits: Tensor, k: int) -> Pair:
    """Mixtral with the highest ids first among equals."""
    ids = logits.shape[1] - 1 - select_top(logits.flip(1), k)
    return ids, torch.softmax(logits.gather(1, ids), dim=1)


def v3(losing: float = -torch.inf, biased: bool = False, best: int = 2, normalised: bool = True):
    """DeepSeek-V3 as it is often written, with what can be wrong."""

    def choose(logits, k, bias, num_groups, groups_kept, scale):
        scores = logits.sigmoid()
        wanted = scores + bias
        groups = wanted.unflatten(1, (num_groups, -1))
        kept = groups.topk(min(best, groups.shape[2]), dim=2)[0].sum(dim=2).topk(groups_kept, dim=1)[1]
        mask = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, kept, True)
        wanted = groups.masked_fill(~mask.unsqueeze(-1), losing).flatten(1)
        ids = wanted.topk(k, dim=1)[1]
        weights = (scores + bias if biased else scores).gather(1, ids)
        return ids, scale * (weights / weights.sum(dim=1, keepdim=True) if normalised else weights)

    return choose


def sharp(logits: Tensor, k: int) -> Pair:
    """OLMoE at half the temperature: no mistake that is known."""
    return token_choice("raw")(2 * logits, k)


@pytest.mark.parametrize(
    ("fn", "rule", "told"),
    [
        (RAW, "mixtral", "weights are raw scores; the rule renormalises them"),
        (lambda logits, k: SELECTED(logits, k) if k > 1 else RAW(logits, k), "olmoe", None),
        (by_topk, "qwen3", "equal scores alone: the order among them"),
        (v3(losing=0.0), "deepseek_v3", "losing groups are set to 0, not -inf"),
        (v3(biased=True), "deepseek_v3", "weights come from biased scores"),
        (v3(best=1), "deepseek_v3", "groups are ranked by their best expert"),
        (v3(normalised=False), "deepseek_v3", "weights are raw scores"),
        (lambda logits, k, bias, **o: v3()(logits, k, 0 * bias, **o), "deepseek_v3", "the bias is not used"),
        (limited("sigmoid", "max", "renormalised"), "deepseek_v4", "sigmoid, not sqrt(softplus)"),
        (limited("softmax", "top2", "raw"), "deepseek_v2", "groups are ranked by their two best"),
        (lambda logits, k, bias: v3()(logits, k, bias, 1, 1, 1), "loss_free", "weights are renormalised"),
        (SELECTED, "gpt_oss", "chosen by softmax scores, which tie where they underflow"),
        (token_choice("raw"), "llama4", None),
        (OWN["loss_free"], "llama4", "chosen by sigmoid scores, which tie where they round to 1"),
        (lambda logits, k, p: OWN["top_p"](logits, k, p - 0.2), "top_p", None),
        (lambda logits, k: expert_choice(logits.log_softmax(dim=0), k), "expert_choice", None),
        (lambda logits, k: RAW(logits, k), "sinkhorn", None),
        (OWN["loss_free"], "base", "nothing is balanced"),
        (
            lambda logits, k, **o: (OWN["hash"](logits, k, **o)[0], torch.ones(logits.shape[0], k)),
            "hash",
            None,
        ),
        (lambda logits, k, coins, capacity: gshard(logits, k, coins, None), "gshard", None),
        (sharp, "switch", None),
    ],
)
def test_a_wrong_router_is_found_and_named(fn: Callable[..., Pair], rule: str, told: str | None):
    found = found_by(fn, rule)
    assert told is None or any(told in line for line in found.diagnosis), str(found)
    with pytest.raises(Mismatch):
        check_router(fn, rule)


def over_tokens(logits: Tensor, k: int) -> Pair:
    """Expert choice whose softmax runs over tokens."""
    scores = logits.softmax(dim=0).T
    places = min(logits.shape[0], -(-k * logits.shape[0] // logits.shape[1]))
    ids = select_top(scores, places) if scores.numel() else scores[:, :0].long()
    return ids, scores.gather(1, ids)


def test_experts_may_return_their_tokens():
    def right(logits: Tensor, k: int) -> Pair:
        scores = logits.softmax(dim=1).T
        ids, _ = over_tokens(logits, k)
        ids = select_top(scores, ids.shape[1]) if scores.numel() else ids
        return ids, scores.gather(1, ids)

    assert check_router(right, "expert_choice").ok
    assert found_by(over_tokens, "expert_choice").diagnosis == (
        "the softmax runs over tokens, not over experts",
    )


@pytest.mark.parametrize("wrong", ["coin", "drop", "turn"])
def test_gshards_mistakes_are_told_apart(wrong: str):
    def choose(logits, k, coins, capacity):
        scores = logits.softmax(dim=1)
        ids = select_top(scores, 2)
        weights = scores.gather(1, ids)
        shares = weights / weights.sum(dim=1, keepdim=True)
        used = 2 * (weights if wrong == "coin" else shares)[:, 1] > coins
        ids = torch.stack([ids[:, 0], torch.where(used, ids[:, 1], -1)], dim=1)
        found = Assignment(ids, shares, logits.shape[1])
        slots = make_plan(found, capacity, order="position" if wrong == "turn" else "rank").slots
        if wrong == "drop":
            shares = torch.where(slots >= 0, weights, 0)
            shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-9)
        return torch.where(slots >= 0, ids, -1), shares

    (told,) = found_by(choose, "gshard").diagnosis
    assert {"coin": "second's coin", "drop": "after drops", "turn": "seated before"}[wrong] in told


def test_the_report_reads_like_one():
    text = str(found_by(v3(losing=0.0), "deepseek_v3"))
    lines = text.splitlines()
    assert lines[0].startswith("router against deepseek_v3: ")
    assert any(
        "0.5, 0.4 | 0.3, 0.2 with bias -1: losing groups stay out below 0: token 0 went to experts" in line
        for line in lines
    )
    assert lines[-1].startswith("  explained by: losing groups are set to 0")
    assert str(check_router(RAW, "switch")).endswith("cases pass")


def test_what_a_function_raises_is_a_difference_in_a_report_only():
    def broken(logits: Tensor, k: int) -> Pair:
        raise RuntimeError("no kernel\nfor this")

    found = found_by(broken, "mixtral")
    assert found.passed == 0
    assert "raised RuntimeError: no kernel" in str(found)
    with pytest.raises(RuntimeError, match="no kernel"):
        check_router(broken, "mixtral")


def test_a_fixed_option_is_not_handed_over():
    def of_two(logits: Tensor, k: int, bias: Tensor) -> Pair:
        assert (k, logits.shape[1]) == (2, 8)
        return OWN["deepseek_v3"](logits, k, bias, 4, 2, 7.0)

    fixed = {"num_selected": 2, "num_experts": 8, "num_groups": 4, "groups_kept": 2, "scale": 7.0}
    assert check_router(of_two, "deepseek_v3", **fixed).ok  # type: ignore[arg-type]
    found_by(of_two, "deepseek_v3", **{**fixed, "scale": 6.0})

    def plain(logits: Tensor, k: int, bias: Tensor) -> Pair:
        return OWN["deepseek_v3"](logits, k, bias)

    assert check_router(plain, "deepseek_v3", num_groups=1, groups_kept=1, scale=1.0).cases > 10


def test_padding_must_get_nothing():
    def deaf(logits: Tensor, k: int, mask: Tensor | None = None) -> Pair:
        return SELECTED(logits, k)

    assert check_router(deaf, "mixtral").ok
    found = found_by(deaf, "mixtral", padding=True)
    assert "with padding: token 1 went to experts" in str(found)


def test_unknown_options_are_refused():
    with pytest.raises(
        UserError, match=r"option 'groups' of rule 'deepseek_v2' is unknown; allowed: num_sel"
    ):
        check_router(OWN["deepseek_v2"], "deepseek_v2", groups=2)
    with pytest.raises(UserError, match=r"no case of rule 'mixtral' has \{'num_selected': 0\}"):
        check_router(SELECTED, "mixtral", num_selected=0)
