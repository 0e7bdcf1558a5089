"""The encoder-decoder: who sees whom, padding, the cache, and T5-Base's own number of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.backbones import EncoderDecoder, count_cost, on_no_memory
from gatewright.errors import UserError
from gatewright.parts import MLP, Capacity, MoELayer, build_router

VOCAB, WIDTH = 30, 16


def mixture(**changes: Any) -> MoELayer:
    return MoELayer(WIDTH, 4, 2, 8, **changes)


def model(**changes: Any) -> EncoderDecoder:
    """Return a small fp64 model whose second layers are mixtures."""
    torch.manual_seed(0)
    stacks = [[MLP(WIDTH, 24, "relu"), mixture()] for _ in range(2)]
    arguments: dict[str, Any] = {"head_dim": 4, "num_buckets": 8, "max_distance": 20} | changes
    return EncoderDecoder(VOCAB, WIDTH, 4, *stacks, **arguments).double().eval()


def ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_logit_sees_the_whole_source_and_no_later_target():
    net, source, target = model(), ids(2, 7), ids(2, 6, 2)
    before = net(source, target).logits
    for place in (0, 3, 5):
        changed = target.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        after = net(source, changed).logits
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-12, atol=1e-13)
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-4)
    for place in (0, 6):
        changed = source.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        assert (net(changed, target).logits - before).abs().amax(dim=(0, 2)).min() > 1e-6


def test_padding_changes_nothing():
    net, source, target = model(), ids(2, 7), ids(2, 6, 2)
    alone = [net(source[:1, :4], target[:1, :3]).logits, net(source[1:], target[1:]).logits]
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    target_mask = torch.tensor([[True] * 3 + [False] * 3, [True] * 6])
    both = net(source, target, mask, target_mask)
    torch.testing.assert_close(both.logits[:1, :3], alone[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(both.logits[1:], alone[1], rtol=1e-11, atol=1e-12)
    assert int(both.stats["encoder.layers.1.router"].tokens) == 4 + 7
    assert int(both.stats["decoder.layers.1.router"].tokens) == 3 + 6
    assert set(both.stats) == set(net.routers())


@pytest.mark.parametrize("pieces", [(6,), (1,) * 6, (3, 1, 2)])
@torch.no_grad()
def test_the_cache_gives_the_same_logits(pieces: tuple[int, ...]):
    net, source, target = model(), ids(2, 7), ids(2, 6, 2)
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    whole = net(source, target, mask).logits
    cache = net.new_cache(net.encode(source, mask), 6)
    out = [net.decode(target[:, cache.length : cache.length + n], cache).logits for n in pieces]
    torch.testing.assert_close(torch.cat(out, dim=1), whole, rtol=1e-11, atol=1e-13)
    last = net.decode(target, net.encode(source, mask), only_last=True).logits
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-11, atol=1e-13)


@torch.no_grad()
def test_rows_of_a_cache_can_be_taken():
    net, source, target = model(), ids(2, 7), ids(2, 6, 2)
    cache = net.new_cache(net.encode(source), 6)
    net.decode(target[:, :3], cache)
    rows = torch.tensor([1, 0, 1])
    cache.take(rows)
    again = net.decode(target[rows, 3:], cache).logits
    torch.testing.assert_close(again, net(source, target).logits[rows, 3:], rtol=1e-11, atol=1e-13)


def test_recomputed_blocks_give_the_same_gradients():
    def gradients(recompute: bool) -> list[Tensor]:
        net = model().train()
        for layer in net.modules():
            if isinstance(layer, MoELayer):
                layer.router = build_router("switch", WIDTH, 4, 1).double()
        net.recompute = recompute
        net(ids(2, 7), ids(2, 6, 2), key=torch.tensor(3)).logits.square().sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    torch.manual_seed(1)
    first = gradients(False)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(True), strict=True))


def test_noise_differs_between_the_stacks():
    net, seen = model().train(), []
    for layer in net.modules():
        if isinstance(layer, MoELayer):
            layer.router = build_router("switch", WIDTH, 4, 1).double()
            layer.router.noise.register_forward_hook(lambda *_: None)
            layer.register_forward_pre_hook(
                lambda _, __, given: seen.append(int(given["key"])), with_kwargs=True
            )
    net(ids(1, 4), ids(1, 4), key=torch.tensor(3))
    assert len(set(seen)) == 2


def test_dropout_follows_the_key_falls_on_every_part_and_is_off_in_evaluation():
    net, source, target = model(dropout=0.5), ids(2, 7), ids(2, 6, 2)
    plain = model()
    torch.testing.assert_close(net(source, target).logits, plain(source, target).logits)
    net.train()
    one, same, other = (net(source, target, key=torch.tensor(k)).logits for k in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    with pytest.raises(UserError, match=r"dropout 1\.0; allowed: 0 or more and below 1"):
        model(dropout=1.0)


@pytest.mark.parametrize("part", ["attention", "cross", "feed_forward"])
def test_half_of_what_a_part_adds_is_dropped(part: str):
    net = model(dropout=0.5).train()
    block = next(net.decoder.blocks())
    for name in ("attention", "cross", "feed_forward"):
        for weight in getattr(block, name).parameters():
            weight.data.mul_(name == part)
    x, states = torch.randn(2, 40, WIDTH, dtype=torch.float64), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    bias, seen = net.decoder.bias(40), torch.zeros(1, 1, 1, 5, dtype=torch.float64)
    cross = (*block.cross.keys_and_values(states), seen)
    dropped = block(x, bias, cross, key=torch.tensor(3))[0] - x
    block.eval()
    added = block(x, bias, cross)[0] - x
    zeros = (dropped.abs() < 1e-12) & (added.abs() > 1e-9)
    assert 0.4 < zeros.double().mean() < 0.6
    torch.testing.assert_close(dropped[~zeros], 2 * added[~zeros])


def test_what_is_tied():
    for tie, shared, headed in (("all", True, True), ("inputs", True, False), ("none", False, False)):
        net = model(tie=tie)
        assert (net.target_embedding.weight is net.source_embedding.weight) == shared
        assert (net.head.weight is net.source_embedding.weight) == headed
    assert model(tie="none", source_vocab_size=9).source_embedding.weight.shape == (9, WIDTH)


def test_t5_base_has_its_own_number_of_parameters():
    # 32128 x 768; 12 encoder layers of 4 x 768^2 + 2 x 768 x 3072 + 2 x 768, 12 decoder layers of 8 x 768^2 +
    # 2 x 768 x 3072 + 3 x 768; a norm and 32 x 12 biases for each stack.
    with on_no_memory():
        stacks = [[MLP(768, 3072, "relu") for _ in range(12)] for _ in range(2)]
        base = EncoderDecoder(32128, 768, 12, *stacks, head_dim=64)
    assert sum(p.numel() for p in base.parameters()) == 222_903_552


def test_each_text_is_a_routing_group_where_asked_for():
    # One place per expert and text; equal tokens all want the same expert.
    torch.manual_seed(0)
    capacity = Capacity(1e-9, minimum=1)
    layer = MoELayer(4, 3, 1, 5, weights="raw", capacity=capacity, group_size="sequence").eval()
    _, stats = layer(torch.ones(2, 3, 4))
    assert int(stats["router"].kept.sum()) == 2
    whole = MoELayer(4, 3, 1, 5, weights="raw", capacity=capacity).eval()
    assert int(whole(torch.ones(2, 3, 4))[1]["router"].kept.sum()) == 1


def test_cost_by_hand():
    # Source 5, target 3, D = 16, H x head_dim = 16, V = 30; FLOPs of one pair, over 8 tokens.
    net = model(context=5, target_context=3)
    cost = count_cost(net, 8)
    square = 2 * 16 * 16
    # Encoder 2 layers x 4 maps x 5; decoder: 4 own maps and 2 of the cross x 3, its 2 of the source x 5.
    assert cost.flops["attention_projections"] * 8 == 2 * square * (4 * 5 + 6 * 3 + 2 * 5)
    # A source token meets 5 keys; a target token 2 of its own on average, and 5 of the source.
    assert cost.flops["attention_scores"] * 8 == 2 * 2 * 2 * 16 * (5 * 5 + 3 * 2 + 3 * 5)
    assert cost.flops["dense_ffn"] * 8 == 2 * 2 * 16 * 24 * (5 + 3)
    assert cost.flops["router"] * 8 == 2 * 16 * 4 * (5 + 3)
    assert cost.flops["experts"] * 8 == 2 * 2 * 3 * 16 * 8 * (5 + 3)
    assert cost.flops["head"] * 8 == 2 * 30 * 16 * 3
    assert cost.total_parameters == sum(p.numel() for p in net.parameters())
    # Two mixtures of 4 experts, 2 unchosen, of 3 x 16 x 8.
    assert cost.active_parameters == cost.total_parameters - 2 * 2 * 3 * 16 * 8


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match="tie 'al' is unknown; did you mean 'all'"):
        model(tie="al")
    with pytest.raises(
        UserError, match="source_vocab_size 9 with tie 'all'; allowed: the target's 30, or tie"
    ):
        model(source_vocab_size=9)
    with pytest.raises(UserError, match="context 0"):
        model(context=0)
