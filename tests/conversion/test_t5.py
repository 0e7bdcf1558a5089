"""T5 and Switch Transformers of transformers, read from their own weights: equal logits, gradients, cache."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewright.backbones import EncoderDecoder
from gatewright.conversion import from_t5, load_t5
from gatewright.errors import UserError

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 4,
    "num_heads": 3,
}
SIZES |= {"num_decoder_layers": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
SWITCH: dict[str, Any] = SIZES | {
    "num_experts": 3,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
}


def t5(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(**SIZES | changes)
    return shaken(transformers.T5ForConditionalGeneration(config))


def switch(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(**SWITCH | changes)
    return shaken(transformers.SwitchTransformersForConditionalGeneration(config))


def exact_norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def shaken(theirs: nn.Module) -> nn.Module:
    """Return the model in fp64 with norms that scale and weights large enough that every part matters.

    Its norms and routers would go through fp32, which is too coarse to compare gradients.
    """
    for module in theirs.modules():
        if type(module).__name__.endswith("LayerNorm"):
            module.forward = functools.partial(exact_norm, module)
        if type(module).__name__.endswith("Router"):
            module.dtype = torch.float64
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.4)
    return theirs.double().eval()


def read(theirs: Any) -> EncoderDecoder:
    return from_t5(theirs.config.to_dict(), theirs.state_dict())


def pair() -> tuple[Tensor, Tensor, Tensor]:
    """Return source, mask (padding on the right) and target."""
    draw = torch.Generator().manual_seed(1)
    source, target = (torch.randint(0, 40, (3, n), generator=draw) for n in (17, 9))
    mask = torch.arange(17) < torch.tensor([[17], [11], [4]])
    return source, mask, target


CASES = {
    "t5": lambda: t5(),
    "t5 gated": lambda: t5(feed_forward_proj="gated-silu"),
    "t5 1.1": lambda: t5(tie_word_embeddings=False),
    "switch": lambda: switch(expert_capacity=64),
    "switch that drops": lambda: switch(expert_capacity=2),
    "switch in every layer": lambda: switch(num_sparse_encoder_layers=4, num_sparse_decoder_layers=4),
    "switch with a router's bias": lambda: switch(router_bias=True),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case: str):
    theirs: Any = CASES[case]()
    ours = read(theirs).double()
    source, mask, target = pair()
    expected = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits
    output = ours(source, target, mask)
    torch.testing.assert_close(output.logits, expected, rtol=1e-9, atol=1e-10)
    dropped = sum(int(record.dropped_by_rank.sum()) for record in output.stats.values())
    assert (dropped > 0) == (case == "switch that drops")
    (expected.square() * torch.linspace(0.5, 2, 40)).sum().backward()
    (output.logits.square() * torch.linspace(0.5, 2, 40)).sum().backward()
    embedding = ours.source_embedding.weight.grad
    if ours.tie != "all":  # theirs stay one matrix, of which only the scale is gone
        embedding = embedding + ours.head.weight.grad
    torch.testing.assert_close(embedding, theirs.shared.weight.grad, rtol=1e-8, atol=1e-9)
    bias = theirs.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
    torch.testing.assert_close(ours.decoder.bias.weight.grad, bias, rtol=1e-8, atol=1e-9)


def test_in_fp32_logits_are_within_1e_5():
    theirs: Any = switch(expert_capacity=3).float()
    for module in theirs.modules():
        module.__dict__.pop("forward", None)  # as it came
        if type(module).__name__.endswith("Router"):
            module.dtype = torch.float32
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.5)
    source, mask, target = pair()
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits
        difference = (read(theirs)(source, target, mask).logits - expected).abs().max()
    assert float(difference) < 1e-5


@torch.no_grad()
def test_decoding_with_both_caches_gives_the_same_logits():
    theirs: Any = switch(expert_capacity=64)
    ours = read(theirs).double()
    source, mask, target = pair()
    cache, past = ours.new_cache(ours.encode(source, mask), 9), None
    encoded = theirs.encoder(input_ids=source, attention_mask=mask.long())
    for s in range(9):
        step = theirs(
            encoder_outputs=encoded,
            attention_mask=mask.long(),
            decoder_input_ids=target[:, s : s + 1],
            past_key_values=past,
            use_cache=True,
        )
        past = step.past_key_values
        mine = ours.decode(target[:, s : s + 1], cache).logits
        torch.testing.assert_close(mine, step.logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ["t5", "switch"])
def test_a_saved_folder_is_read(case: str, tmp_path: Path):
    theirs: Any = CASES[case]().float()
    theirs.save_pretrained(tmp_path)
    source, mask, target = pair()
    with torch.no_grad():
        expected = read(theirs)(source, target, mask).logits
        assert torch.equal(load_t5(tmp_path)(source, target, mask).logits, expected)


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path):
    theirs: Any = switch()
    config, tensors = theirs.config.to_dict(), theirs.state_dict()
    with pytest.raises(UserError, match="model_type 'bert'; allowed: t5, switch_transformers"):
        from_t5(config | {"model_type": "bert"}, tensors)
    with pytest.raises(UserError, match="activation 'gated-gelu'; allowed: relu"):
        from_t5(config | {"dense_act_fn": "gated-gelu"}, tensors)
    with pytest.raises(UserError, match=r"tensor decoder\.final_layer_norm\.weight is not there"):
        from_t5(config, {k: v for k, v in tensors.items() if k != "decoder.final_layer_norm.weight"})
    with pytest.raises(UserError, match="tensor more belongs nowhere"):
        from_t5(config, tensors | {"more": torch.zeros(1)})
    with pytest.raises(UserError, match=r"a tensor of \[24, 16\] for one of \[25, 16\]"):
        from_t5(config | {"d_ff": 25}, tensors)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_t5(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        load_t5(tmp_path)
