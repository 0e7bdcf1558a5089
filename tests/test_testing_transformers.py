"""What gatewright.testing finds in the routers and losses of the transformers that is installed for tests."""

from __future__ import annotations

import pytest
import torch

from gatewright.testing import Report, check_balance, check_router

hf = pytest.importorskip("tests.hf_routers", exc_type=ImportError)

# Their scores are computed in fp32 whatever comes in.
IN = {"dtype": torch.float32, "report": True}
TIES = "equal scores alone: the order among them is another than the lowest id first"


@pytest.mark.parametrize("rule", ["mixtral", "qwen3", "olmoe", "gpt_oss", "deepseek_v3"])
def test_these_routers_differ_in_ties_alone(rule: str):
    # Which of equal experts torch.topk takes is not defined, so nothing more is asserted of them.
    found = check_router(hf.ROUTERS[rule], rule, **IN)
    assert found.diagnosis in ((), (TIES,)), str(found)
    assert check_router(hf.ROUTERS[rule], rule, ties=False, **IN).ok


@pytest.mark.parametrize("rule", ["deepseek_v2", "deepseek_v4", "deepseek_v4_hash", "llama4", "switch"])
def test_these_routers_pass(rule: str):
    found = check_router(hf.ROUTERS[rule], rule, ties=False, **IN)
    assert found.ok, str(found)


def test_axk2_takes_losing_groups_where_biased_scores_are_negative():
    found = check_router(hf.AXK2, "deepseek_v3", ties=False, **IN)
    assert found.diagnosis == (
        "losing groups are set to 0, not -inf: they win where biased scores are negative",
    )


def test_nllb_holds_the_coin_to_the_raw_score():
    found = check_router(hf.nllb_router(before_dropping=True), "gshard", **IN)
    assert found.diagnosis == (
        "the second's weight and coin use its raw score, the first's weight its share",
    )
    found = check_router(hf.nllb_router(before_dropping=False), "gshard", **IN)
    assert found.diagnosis == (
        "shares are taken after drops, and the second's coin is held to its raw score",
    )


def said(found: Report) -> str:
    assert not found.ok
    return str(found)


def test_the_balance_loss_sums_to_k_pools_layers_and_is_nan_of_nothing():
    one = check_balance(hf.balance, "balance", chooses=True, over_layers=True, **IN)
    (line,) = one.diagnosis
    assert line.startswith("layers are pooled before the product: their imbalances cancel; every value is K")
    text = said(
        check_balance(hf.balance, "balance", convention="transformers", chooses=True, over_layers=True, **IN)
    )
    assert "two layers whose imbalances cancel: 3/2 each: the value is 1; expected 1.5" in text
    assert "balance, padding alone: the value is nan; expected 0" in text
    assert "balance, no tokens: the value is nan; expected 0" in text


def test_the_balance_loss_of_one_layer_is_as_its_convention_says():
    def one_layer(logits, experts, mask):
        found = hf.balance(logits.unsqueeze(0), experts.unsqueeze(0), mask)
        return (
            torch.nan_to_num(found) if not logits.shape[0] or (mask is not None and not mask.any()) else found
        )

    found = check_balance(one_layer, "balance", convention="transformers", chooses=True, **IN)
    assert found.ok, str(found)


def test_switchs_losses_count_padding_and_pool_layers():
    options = {"num_selected": 1, **IN}
    found = check_balance(hf.switch_balance, "sequence_balance", **options)
    assert found.diagnosis == ("padding is counted",)
    assert check_balance(hf.switch_z, "z", **IN).diagnosis == ("padding is counted",)
    (line,) = check_balance(
        hf.switch_over_layers, "balance", chooses=True, over_layers=True, padding=False, **options
    ).diagnosis
    assert line == "layers are pooled before the product: their imbalances cancel"


def test_router_logits_are_logits():
    # A router that hands out probabilities makes the loss put them through a second softmax.
    pairs = hf.recorded_and_true_logits()
    assert len(pairs) == 4
    for recorded, true in pairs:
        torch.testing.assert_close(recorded, true)
