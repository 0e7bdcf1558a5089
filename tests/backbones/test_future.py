"""Multi-token prediction: equations 21 to 25 by hand, what it may see, its loss, and guesses in decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatewright.backbones import AheadReader, Block, Decoder, count_cost
from gatewright.backbones.attention import Attention
from gatewright.errors import UserError
from gatewright.generation import generate
from gatewright.objectives import NextToken
from gatewright.parts import MLP, MoELayer

VOCAB, WIDTH = 30, 16


def decoder(depths: int = 2, **changes: Any) -> Decoder:
    torch.manual_seed(0)

    def block() -> Block:
        return Block(WIDTH, Attention(WIDTH, 2, 2, 8), MoELayer(WIDTH, 4, 2, 8), 1e-5)

    layers = [MLP(WIDTH, 24), MoELayer(WIDTH, 4, 2, 8)]
    arguments = {"context": 24, "head_dim": 8, "future": [block() for _ in range(depths)]} | changes
    model = Decoder(VOCAB, WIDTH, 2, layers, **arguments).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.4)
    return model


def texts(length: int = 9) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def test_each_depth_is_its_equations():
    model, tokens = decoder().train(), texts()
    output = model(tokens)
    states = model.norm(model.read(tokens)[0])
    assert [tuple(logits.shape) for logits in output.future] == [(2, 8, VOCAB), (2, 7, VOCAB)]
    for k, (module, logits) in enumerate(zip(model.future, output.future, strict=True), 1):
        # Position i has the state of depth k - 1 at i, and the token k places behind.
        both = [
            rms(states[:, : 9 - k], module.state_norm.weight),
            rms(model.embedding.weight[tokens[:, k:]], module.token_norm.weight),
        ]
        joined = torch.cat(both, dim=-1) @ module.join.weight.t()
        cos, sin = model.rotary.angles(0, 9 - k, tokens.device)
        states = rms(module.block(joined, cos, sin)[0], module.norm.weight)
        torch.testing.assert_close(logits, states @ model.head.weight.t(), rtol=1e-9, atol=1e-11)


def test_a_guess_of_depth_k_sees_k_tokens_more_and_none_beyond():
    model, tokens = decoder().train(), texts()
    before = model(tokens).future
    for place in range(9):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        after = model(changed).future
        for k in (1, 2):
            free = max(0, place - k)
            torch.testing.assert_close(after[k - 1][:, :free], before[k - 1][:, :free], rtol=1e-9, atol=1e-11)
            if free < 9 - k:
                assert not torch.allclose(after[k - 1][:, free], before[k - 1][:, free], atol=1e-6)


def test_the_loss_is_lambda_times_the_mean_over_depths():
    model, tokens = decoder().train(), texts(10)
    output = model(tokens[:, :-1])
    found = NextToken(future_weight=0.3)(output, tokens[:, 1:])
    # At i, depth k predicts token i + k + 1 of the text.
    losses = [
        F.cross_entropy(output.future[k - 1].flatten(0, 1), tokens[:, 1 + k :].flatten()) for k in (1, 2)
    ]
    torch.testing.assert_close(found.total, found.task + 0.3 / 2 * (losses[0] + losses[1]))
    found.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with pytest.raises(UserError, match="future_weight -1"):
        NextToken(future_weight=-1)


def test_nothing_further_is_computed_in_evaluation_or_for_texts_too_short():
    model = decoder()
    assert model.eval()(texts()).future == ()
    assert [tuple(one.shape[:2]) for one in model.train()(texts(2)).future] == [(2, 1)]
    assert model(texts(1)).future == ()
    plain = decoder(0)
    assert plain.train()(texts()).future == ()
    assert not any("future" in name for name in plain.state_dict())


def test_routers_and_stats_of_further_blocks_have_names():
    model = decoder().train()
    names = {"layers.1.router", "future.0.router", "future.1.router"}
    assert set(model.routers()) == set(model(texts()).stats) == names
    assert set(model.eval()(texts()).stats) == {"layers.1.router"}


def test_training_pays_for_what_it_computes():
    plain, further = count_cost(decoder(0), 9), count_cost(decoder(2), 9)
    block = 4 * WIDTH * WIDTH + 3 * WIDTH + 2 * WIDTH * WIDTH + 2 * WIDTH
    experts, router = 3 * WIDTH * 8, 4 * WIDTH
    assert further.total_parameters - plain.total_parameters == 2 * (block + 4 * experts + router)
    assert further.active_parameters - plain.active_parameters == 2 * (block + 2 * experts + router)
    assert further.flops["head"] == 3 * plain.flops["head"]
    assert further.flops["future"] == 2 * 2 * 2 * WIDTH * WIDTH


def test_guesses_change_no_id():
    for seed in range(4):
        model = decoder(1, context=12).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        prompt = torch.randint(0, VOCAB, (1 + seed % 4,)).tolist()
        # Past the context of 12, too; greedy, and with draws.
        for drawing in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "seed": seed}):
            expected = generate(model, prompt, max_new_tokens=16, **drawing)
            assert generate(model, prompt, max_new_tokens=16, ahead=True, **drawing) == expected


def test_right_guesses_save_passes_and_wrong_ones_none():
    model = decoder(1).eval()
    with torch.no_grad():
        # All logits are equal, so that the likeliest token and every guess are 0.
        model.head.weight.zero_()
    text, reader = [3, 4], AheadReader(model, 24)
    with torch.inference_mode():
        for _ in range(10):
            text.append(int(reader.read(torch.tensor([text])).argmax()))
    # The prompt, then one pass for each two of the other nine.
    assert reader.passes == 1 + 5
    wrong = AheadReader(model, 24)
    with torch.inference_mode():
        for new in range(1, 11):  # the guess is 0, as the lowest of equals; the text goes on otherwise
            wrong.read(torch.tensor([[3, 4, *range(1, new)]]))
    assert wrong.passes == 10


def test_guesses_need_one_text_and_a_model_that_has_them():
    with pytest.raises(UserError, match="predicts no token behind the next"):
        generate(decoder(0), [1], max_new_tokens=1, ahead=True)
    with pytest.raises(UserError, match="several texts"):
        generate(decoder(1), texts(), max_new_tokens=1, ahead=True)
    with pytest.raises(UserError, match="without cache"):
        generate(decoder(1), [1], max_new_tokens=1, ahead=True, cache=False)
