"""What hooks record of transformers' routers: the choices, without padding, once, for every family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewright.conversion import NOT_RECORDED, RecordedModel, RouterRecorder, router_sites
from gatewright.errors import UserError
from gatewright.inspection import capture_routing
from gatewright.parts import RouterStats, balance_loss
from gatewright.parts.scores import probabilities

hf = pytest.importorskip("tests.conversion.families", exc_type=ImportError)
tiny = pytest.importorskip("tests.conversion.tiny", exc_type=ImportError)

each_whole = pytest.mark.parametrize("family", hf.WHOLE)
each_family = pytest.mark.parametrize("family", tiny.every_family())


def padded() -> tuple[Tensor, Tensor]:
    """Return ids and a mask: the first sequence padded to the right, the second to the left."""
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 6:], mask[1, :4] = 0, 0
    return hf.token_ids(), mask


def recorded(model: Any, ids: Tensor, **more: Any) -> dict[str, RouterStats]:
    """Return what one pass chose, with every token."""
    with RouterRecorder(model, capture=True) as recorder, torch.no_grad():
        model(ids, **more)
    return dict(recorder.stats)


class _Toy(nn.Module):
    """A router whose logits are its input, beside experts that do nothing."""

    class Router(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            chosen, experts = x.softmax(dim=-1).topk(2, dim=-1)
            # Turned round: transformers promises no order.
            return x, chosen.flip(1), experts.flip(1)

    class Experts(nn.Module):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return hidden_states

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = _Toy.Router(), _Toy.Experts()

        def forward(self, x: Tensor) -> Tensor:
            _, weights, experts = self.gate(x)
            return self.experts(x, experts, top_k_weights=weights)

    def __init__(self) -> None:
        super().__init__()
        self.mlp = self.Block()

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.mlp(inputs_embeds.flatten(0, 1)).view_as(inputs_embeds)


def test_by_hand():
    # Three tokens, e^logits = (1, 2, 5), (4, 1, 3) and, as padding, NaN. Choices in falling order: 2 1, 0 2.
    x = torch.tensor([[[1.0, 2.0, 5.0], [4.0, 1.0, 3.0], [1.0, 1.0, 1.0]]]).log()
    x[0, 2] = math.nan
    model = _Toy()
    with RouterRecorder(model, capture=True) as recorder:
        model(x, attention_mask=torch.tensor([[1, 1, 0]]))
    (stats,) = recorder.stats.values()
    assert list(recorder.stats) == ["mlp"]
    assert stats.experts is not None
    assert stats.combine_weights is not None
    assert stats.experts.tolist() == [[2, 1], [0, 2], [-1, -1]]
    assert stats.combine_weights[:2].tolist() == [
        pytest.approx([5 / 8, 2 / 8]),
        pytest.approx([4 / 8, 3 / 8]),
    ]
    assert (int(stats.tokens), stats.counts.tolist(), stats.first_counts.tolist()) == (
        2,
        [1, 1, 2],
        [1, 0, 1],
    )
    assert stats.score_sums.tolist() == pytest.approx([5 / 8, 3 / 8, 8 / 8])
    assert stats.logsumexp_sum.item() == pytest.approx(2 * math.log(8))
    assert int(stats.nonfinite) == 0
    # E sum f P = 3 (1/4 5/16 + 1/4 3/16 + 2/4 8/16) = 3 (8/64 + 16/64).
    assert balance_loss(recorder.stats).item() == pytest.approx(9 / 8)


@each_whole
def test_choices_and_counts_are_those_of_the_logits_that_the_model_hands_out(family: str):
    if family == "deepseek_v3":
        pytest.skip("chooses by groups, not the highest: tests/test_testing_transformers.py has its choices")
    model = hf.whole_model(family)
    with RouterRecorder(model, capture=True) as recorder, torch.no_grad():
        logits = model(hf.token_ids(), output_router_logits=True).router_logits
    assert len(recorder.stats) == len(logits) == 2
    for stats, expected in zip(recorder.stats.values(), logits, strict=True):
        assert stats.experts is not None
        chosen = stats.experts.sort(dim=1).values
        assert torch.equal(chosen, expected.topk(2, dim=1).indices.sort(dim=1).values)
        assert stats.counts.tolist() == [int((chosen == expert).sum()) for expert in range(5)]


@each_family
def test_every_family_is_read(family: str):
    model = tiny.tiny_model(family)
    flag = {} if family in tiny.HANDED_OUT else {"output_router_logits": True}
    with RouterRecorder(model, capture=True) as recorder, torch.no_grad():
        out = model(tiny.ids(), use_cache=False, **flag)
    routers = dict(recorder.stats)
    assert len(routers) == tiny.ROUTERS.get(family, tiny.LAYERS)
    if flag:
        for stats, logits in zip(routers.values(), out.router_logits, strict=True):
            assert stats.logits is not None
            assert torch.equal(stats.logits, logits.float().view_as(stats.logits))
    for site in router_sites(model):
        if site.name not in routers:
            assert site.name.endswith("vision_moe")  # Ernie's, which text does not pass
            continue
        stats = routers[site.name]
        assert stats.experts is not None
        assert stats.combine_weights is not None
        assert stats.logits is not None
        assert (int(stats.tokens), int(stats.counts.sum())) == (14, 14 * stats.num_selected)
        assert (stats.combine_weights[:, :-1] >= stats.combine_weights[:, 1:]).all()
        if family not in tiny.WEIGHTS_APART:
            # Weights are scores, times one number per token: another score function would not be.
            scores = site.scores(stats.logits).gather(1, stats.experts)
            ratio = stats.combine_weights.float() / scores
            torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=2e-3, atol=1e-6)


@each_whole
def test_padding_enters_nothing(family: str):
    model = hf.whole_model(family)
    ids, mask = padded()
    found = recorded(model, ids, attention_mask=mask)
    alone = recorded(model, ids[:1, :6])
    rows = recorded(model, ids[1:, 4:])
    for name, stats in found.items():
        assert int(stats.tokens) == 11
        assert stats.group_tokens.tolist() == [6, 5]
        assert torch.equal(stats.counts, alone[name].counts + rows[name].counts)
        torch.testing.assert_close(stats.score_sums, alone[name].score_sums + rows[name].score_sums)
        assert stats.experts is not None
        assert ((stats.experts == -1).all(dim=1) == (mask.reshape(-1) == 0)).all()


def test_the_expert_of_zaya_that_computes_nothing_is_the_last():
    model = tiny.tiny_model("zaya")
    for site in router_sites(model):
        site.router.balancing_biases[-1] = 100.0
    for stats in recorded(model, tiny.ids(), use_cache=False).values():
        assert stats.counts.tolist() == [0] * tiny.E + [14]


def test_with_a_cache_the_last_columns_of_the_mask_are_this_pass():
    model = hf.whole_model("mixtral")
    ids, mask = padded()
    mask[0] = 1
    with RouterRecorder(model, capture=True) as recorder, torch.no_grad():
        cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
        assert [int(stats.tokens) for stats in recorder.stats.values()] == [12, 12]
        model(ids[:, 8:], attention_mask=mask, past_key_values=cache)
    assert [int(stats.tokens) for stats in recorder.stats.values()] == [2, 2]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_layers_that_are_computed_again_are_not_counted_again(family: str):
    model = hf.whole_model(family).train()
    ids = hf.token_ids()
    model.activation_checkpointing_enable()
    calls = []
    name = router_sites(model)[0].name
    model.get_submodule(name).gate.register_forward_hook(lambda *_: calls.append(1))
    with RouterRecorder(model) as recorder:
        loss = model(ids, labels=ids, use_cache=False).loss
        before = {key: stats.counts.clone() for key, stats in recorder.stats.items()}
        loss.backward()
        assert len(calls) == 2  # the layer did run twice
        assert all(torch.equal(recorder.stats[key].counts, counts) for key, counts in before.items())
    assert all(int(counts.sum()) == 2 * 18 for counts in before.values())


def test_a_pass_that_fails_leaves_nothing_behind():
    model = hf.whole_model("mixtral")
    ids = hf.token_ids()
    with RouterRecorder(model) as recorder, torch.no_grad():
        expected = model(ids)
        counts = {name: stats.counts for name, stats in recorder.stats.items()}
        stop = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        assert dict(recorder.stats) == {}
        stop.remove()
        assert torch.equal(model(ids).logits, expected.logits)
        assert all(torch.equal(recorder.stats[name].counts, counted) for name, counted in counts.items())


def test_closed_it_leaves_no_hook():
    model = hf.whole_model("gpt_oss")
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    recorder = RouterRecorder(model)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] != before
    recorder.close()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_sums_carry_gradients_to_the_router():
    model = hf.whole_model("olmoe").train()
    with RouterRecorder(model) as recorder:
        model(hf.token_ids())
    balance_loss(recorder.stats).backward()
    assert all(bool((layer.mlp.gate.weight.grad != 0).any()) for layer in model.model.layers)


def test_called_as_a_model_of_ours():
    model = hf.whole_model("qwen3_moe")
    found = capture_routing(RecordedModel(model), hf.token_ids())
    expected = recorded(model, hf.token_ids())
    for name, routed in found.items():
        stats = expected[name]
        assert torch.equal(routed.experts, stats.experts)
        function = router_sites(model)[0].scores
        shares = probabilities(function, stats.logits, function(stats.logits)).gather(1, routed.experts)
        torch.testing.assert_close(routed.scores, shares)


def test_models_without_a_router_are_refused_with_the_reason():
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers import SwitchTransformersConfig as Config
    from transformers import SwitchTransformersForConditionalGeneration as Switch

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1
        )
    )
    with pytest.raises(UserError, match="LlamaForCausalLM has no router; allowed"):
        RouterRecorder(llama)
    sizes = {"num_layers": 2, "num_decoder_layers": 2, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2}
    with pytest.raises(UserError, match=r"has routers that cannot be read .an encoder and a decoder"):
        RouterRecorder(Switch(Config(vocab_size=20, **sizes)))


def test_expert_parallelism_is_refused():
    model = hf.whole_model("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(UserError, match=r"model.layers.1.mlp are spread over ranks .* allowed: models whose"):
        RouterRecorder(model)


def test_what_is_not_read_is_what_the_page_lists():
    from pathlib import Path

    page = (Path(__file__).resolve().parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("`"): row[1] for row in rows if row[0].strip("`") in NOT_RECORDED}
    assert listed == NOT_RECORDED
    assert set(NOT_RECORDED) <= hf.families_without()
