"""DeepSeek's papers: counts by hand, their losses in our convention, and a run that moves what it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gatewright.backbones import count_cost, on_no_memory
from gatewright.errors import UserError
from gatewright.papers import get_paper, published
from gatewright.parts.balancing import balance_loss
from gatewright.parts.device_losses import communication_loss, device_loss
from gatewright.parts.losses import named_loss
from gatewright.training.state import update_rules

PAPERS = ("deepseek_moe", "deepseek_v2", "deepseek_v3")


def latent(d: int, h: int, query: int, kv: int, plain: int, turned: int, value: int) -> int:
    """Weights of one latent attention, its two norms included."""
    queries = d * query + query + query * h * (plain + turned) if query else d * h * (plain + turned)
    return queries + d * (kv + turned) + kv + kv * h * (plain + value) + h * value * d


# Width, layers, attention's weights, routed, active and shared experts, their width, dense layers and width.
SIZES: dict[str, tuple[int, ...]] = {
    "deepseek-moe-16b": (102400, 2048, 28, 4 * 2048**2, 64, 6, 2, 1408, 1, 10944),
    "deepseek-v2": (102400, 5120, 60, latent(5120, 128, 1536, 512, 128, 64, 128), 160, 6, 2, 1536, 1, 12288),
    "deepseek-v2-lite": (102400, 2048, 27, latent(2048, 16, 0, 512, 128, 64, 128), 64, 6, 2, 1408, 1, 10944),
    "deepseek-v3": (129280, 7168, 61, latent(7168, 128, 1536, 512, 128, 64, 128), 256, 8, 1, 2048, 3, 18432),
}
BILLIONS = {
    "deepseek-moe-16b": (16.4, 2.8),
    "deepseek-v2": (236, 21),
    "deepseek-v2-lite": (15.7, 2.7),
    "deepseek-v3": (671, 37.5),
}


@pytest.mark.parametrize("name", SIZES)
def test_deepseek_counts_by_hand(name: str):
    vocab, d, layers, attention, experts, active, shared, width, dense, ffn = SIZES[name]
    paper, settings = published(name)
    with on_no_memory():
        model = get_paper(paper).build(settings)
    found = count_cost(model, context=1)
    rest = 2 * vocab * d + d + layers * (attention + 2 * d) + dense * 3 * d * ffn
    sparse = layers - dense
    for count, per_token in ((found.total_parameters, experts), (found.active_parameters, active)):
        assert count == rest + sparse * (d * experts + (per_token + shared) * 3 * d * width)
    told = (found.total_parameters / 1e9, found.active_parameters / 1e9)
    assert told == pytest.approx(BILLIONS[name], rel=0.02)
    if paper != "deepseek_moe":
        assert sum(block.attention.cached_numbers for block in model.layers) == 576 * layers


def small(paper: str, **changes: Any) -> Any:
    sizes = {"num_experts": 8, "num_selected": 3, "num_layers": 3, "vocab_size": 20}
    return replace(get_paper(paper).Settings(), **(sizes | changes))


CASES: dict[str, dict[str, Any]] = {
    "deepseek_moe": {"balance_weight": 0.01, "device_weight": 0.05, "num_devices": 4},
    "deepseek_v2": {"balance_weight": 0.003, "device_weight": 0.05, "devices": (4, 3)},
    "deepseek_v3": {"balance_weight": 0.01, "groups": (4, 3), "future_tokens": 0},
}


@pytest.mark.parametrize("paper", PAPERS)
def test_deepseek_adds_its_layers_losses(paper: str):
    settings = small(paper, **CASES[paper])
    torch.manual_seed(1)
    model = get_paper(paper).build(settings)
    tokens = torch.randint(0, 20, (3, 13))
    output = model(tokens[:, :-1])
    found = get_paper(paper).objective(settings)(output, tokens[:, 1:])
    # Two of three layers are sparse, and the papers add theirs; ours are means.
    stats, sparse = output.stats, 2
    assert len(stats) == sparse
    if paper == "deepseek_moe":
        expected = 0.01 * sparse * balance_loss(stats) + 0.05 * sparse * device_loss(stats, 4)
    elif paper == "deepseek_v2":
        expected = 0.003 * sparse * balance_loss(stats) + 0.05 * sparse * device_loss(stats, 4)
        expected = expected + 0.02 * sparse * communication_loss(stats, 4, 3)
    else:
        expected = 0.01 * sparse * balance_loss(stats, "sequence")
    torch.testing.assert_close(found.total - found.task, expected, rtol=1e-4, atol=1e-6)
    assert float(expected.detach()) > 0.001


def test_a_run_moves_the_biases_and_learns_the_further_token():
    settings = small("deepseek_v3", groups=(4, 3))
    torch.manual_seed(1)
    model = get_paper("deepseek_v3").build(settings)
    objective = get_paper("deepseek_v3").objective(settings)
    tokens = torch.randint(0, 20, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ahead = []
    for _ in range(25):
        output = model(tokens[:, :-1])
        loss = objective(output, tokens[:, 1:])
        ahead.append(float((loss.total - loss.task).detach()))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        update_rules(
            model.routers(), {n: {"counts": r.counts, "tokens": r.tokens} for n, r in output.stats.items()}
        )
    # Beside the small loss per sequence it is lambda times the further token's.
    assert ahead[0] == pytest.approx(0.3 * 3.0, rel=0.2)
    assert ahead[-1] < 0.7 * ahead[0]
    assert set(model.routers()) == {"layers.1.router", "layers.2.router", "future.0.router"}
    for router in model.routers().values():
        assert int(router.rule.bias.updates) == 25
        assert float(router.rule.bias.bias.abs().max()) > 1e-3


def test_a_token_of_v2_stays_on_its_devices():
    settings = small("deepseek_v2", num_experts=16, devices=(8, 2))
    torch.manual_seed(1)
    model = get_paper("deepseek_v2").build(settings)
    stats = model(torch.randint(0, 20, (2, 12)), capture=True).stats
    for record in stats.values():
        assert record.experts is not None
        assert max(len(set((row // 2).tolist())) for row in record.experts) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("devise:8", "did you mean 'device'"),
        ("device", "allowed: device:NUM_DEVICES, with whole numbers"),
        ("communication:8", "allowed: communication:NUM_DEVICES:DEVICES_KEPT"),
        ("z:1", "allowed: z, with"),
        ("device:x", "with whole numbers"),
    ],
)
def test_losses_with_numbers_say_what_they_want(name: str, message: str):
    with pytest.raises(UserError, match=message):
        named_loss(name)


@pytest.mark.parametrize(
    ("paper", "changes", "message"),
    [
        ("deepseek_moe", {"num_devices": 3}, "num_devices 3 for 8 experts"),
        ("deepseek_moe", {"device_weight": -1.0}, "device_weight -1.0"),
        ("deepseek_v2", {"devices": (3, 1)}, "num_groups 3 with num_experts 8"),
        ("deepseek_v2", {"communication_weight": -1.0}, "communication_weight -1.0"),
        ("deepseek_v3", {"bias_rate": -0.1}, "bias_rate -0.1"),
        ("deepseek_v3", {"future_tokens": -1}, "future_tokens -1"),
        ("deepseek_v3", {"rope_scaling": "yarn"}, "lacks factor, original"),
    ],
)
def test_settings_that_cannot_be_are_refused(paper: str, changes: dict[str, Any], message: str):
    file, settings = get_paper(paper), small(paper, **changes)

    def build_and_aim() -> None:
        file.build(settings)
        file.objective(settings)

    with pytest.raises(UserError, match=message):
        build_and_aim()
