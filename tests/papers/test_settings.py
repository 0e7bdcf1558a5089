"""Paper files: settings that a person can read, published sizes with the published parameters."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

import pytest
import torch

from gatewright.backbones import count_cost, on_no_memory
from gatewright.errors import UserError
from gatewright.objectives import NextToken
from gatewright.papers import get_paper, published, published_names, text_papers, wired_papers
from gatewright.papers.registry import FORMS
from tests.papers.test_encoder_decoders import GSHARD_BILLIONS, RELEASED_BILLIONS, T5_BILLIONS

FILES = tuple(dict.fromkeys((*wired_papers(), *text_papers(), *FORMS)))

# Billions, total and active; tolerance. In print: 47B and 13B, 141B and 39B; OLMoE table 10: 6.9B and 1.3B.
PUBLISHED_BILLIONS = {
    "mixtral-8x7b": (46.70, 12.88, 0.001),
    "mixtral-8x22b": (140.6, 39.2, 0.0015),
    "olmoe-1b-7b": (6.92, 1.28, 0.005),
    "qwen1.5-moe-a2.7b": (14.3, 2.7, 0.005),
    "qwen2-57b-a14b": (57.4, 14.2, 0.005),
    "qwen3-30b-a3b": (30.5, 3.35, 0.005),
    "qwen3-235b-a22b": (235.1, 22.2, 0.005),
    # gpt-oss is announced with 3.6B and 5.1B active, its 0.58B of embeddings left out.
    "gpt-oss-20b": (20.9, 3.61 + 0.579, 0.005),
    "gpt-oss-120b": (116.8, 5.13 + 0.579, 0.005),
    "llama4-scout": (107.8, 17.2, 0.005),
    "llama4-maverick": (400.7, 17.2, 0.005),
    # By hand in test_deepseek.py.
    "deepseek-moe-16b": (16.4, 2.83, 0.005),
    "deepseek-v2": (235.7, 21.4, 0.005),
    "deepseek-v2-lite": (15.7, 2.66, 0.005),
    "deepseek-v3": (671.0, 37.55, 0.001),
}
# Switch table 9 gives encoder and decoder together; what one stack lacks of the half is cross-attention.
SWITCH_BILLIONS = {"base": 7.0, "large": 26.0, "xxl": 395.0, "c": 1571.0}


def parameters(name: str) -> tuple[int, int]:
    paper, settings = published(name)
    with on_no_memory():
        model = get_paper(paper).build(settings)
    cost = count_cost(model, context=1)
    return cost.total_parameters, cost.active_parameters


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_published_sizes_have_the_published_parameters(name: str):
    total, active, tolerance = PUBLISHED_BILLIONS[name]
    assert parameters(name) == pytest.approx((total * 1e9, active * 1e9), rel=tolerance)


def test_published_counts_are_exact():
    # 2 x 32000 x 4096 + 4096 + 32 (2 x 4096 + 41,943,040 + 32,768 + 8 x 3 x 4096 x 14336); 2 of 8 active.
    assert parameters("mixtral-8x7b") == (46_702_792_704, 12_879_925_248)
    # Attention 4 x 2048^2, four norms, the router; 64 experts of 3 x 2048 x 1024, of which 8 are active.
    layer = 4 * 2048**2 + 4 * 2048 + 64 * 2048
    expert = 3 * 2048 * 1024
    ends = 2 * 50304 * 2048 + 2048
    assert parameters("olmoe-1b-7b") == (ends + 16 * (layer + 64 * expert), ends + 16 * (layer + 8 * expert))


@pytest.mark.parametrize("size", SWITCH_BILLIONS)
def test_switch_decoders_are_about_half_of_the_encoder_decoders(size: str):
    total, active = parameters(f"switch-{size}-decoder")
    assert total / (SWITCH_BILLIONS[size] * 1e9) == pytest.approx(0.5, abs=0.04)
    assert active < 0.06 * total


def test_every_published_size_is_checked():
    # Those of 2017 in test_sparsely_gated.py.
    others = [name for name in published_names() if not name.startswith("sparsely_gated/")]
    pairs = {*GSHARD_BILLIONS, *T5_BILLIONS, *RELEASED_BILLIONS}
    decoders = {*PUBLISHED_BILLIONS, *(f"switch-{size}-decoder" for size in SWITCH_BILLIONS)}
    assert pairs | decoders == {*others}


@pytest.mark.parametrize("paper", FILES)
def test_settings_are_few_and_each_is_explained(paper: str):
    file = get_paper(paper)
    fields = dataclasses.fields(file.Settings)
    assert len(fields) <= 20
    assert file.Settings.__dataclass_params__.frozen
    body = ast.parse(inspect.getsource(file.Settings)).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body[1:], [*body.body[2:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert told, f"{paper}: {ast.unparse(field.target)} has no line that says what it is"


@pytest.mark.parametrize("paper", text_papers())
def test_small_defaults_build_and_train_a_step(paper: str):
    file = get_paper(paper)
    torch.manual_seed(0)
    settings = file.Settings()
    model = file.build(settings)
    assert sum(p.numel() for p in model.parameters()) < 4e6
    tokens = torch.randint(0, settings.vocab_size, (2, 33))
    loss = file.objective(settings)(model(tokens[:, :-1]), tokens[:, 1:])
    loss.total.backward()
    # ln 257 = 5.55 for a model that knows nothing.
    assert 5.3 < float(loss.task.detach()) < 6.2
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert any(
        bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters() if n.endswith("router.weight")
    )


@pytest.mark.parametrize("paper", FILES)
def test_same_seed_same_weights(paper: str):
    file = get_paper(paper)

    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [p.detach() for p in file.build(file.Settings()).parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize("paper", text_papers())
def test_settings_take_one_value_or_one_per_layer(paper: str):
    file = get_paper(paper)
    settings = file.Settings(num_layers=3, num_experts=(8, 9, 16), expert_width=(8, 16, 24), moe_layers="all")
    widths = [
        (b.feed_forward.num_experts, b.feed_forward.experts.w_down.shape[2])
        for b in file.build(settings).layers
    ]
    assert widths == [(8, 8), (9, 16), (16, 24)]
    with pytest.raises(UserError, match="num_experts has 2 values for 3 layers"):
        file.build(file.Settings(num_layers=3, num_experts=(4, 8)))


def objective(paper: str, **changes: Any) -> NextToken:
    file = get_paper(paper)
    made: NextToken = file.objective(file.Settings(**changes))
    return made


def test_objectives_carry_the_papers_weights():
    assert objective("mixtral") == NextToken(balance_weight=0.01)
    assert objective("olmoe") == NextToken(balance_weight=0.01, z_weight=0.001)
    # Switch adds alpha times each sparse layer's loss: 3 of 6 layers are sparse, and ours is their mean.
    assert objective("switch", num_layers=6).balance_weight == pytest.approx(3 * 0.01)
    assert objective("switch", num_layers=6, moe_layers="none").balance_weight == 0


@pytest.mark.parametrize("paper", FILES)
def test_deviations_are_sentences(paper: str):
    for sentence in get_paper(paper).DEVIATIONS:
        assert sentence.endswith(".")
        assert len(sentence) < 250
