"""A Mixtral of ours inside transformers, decoding from a cache: the same weights, their arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Ours -> theirs; of a layer, behind "layers.N." and "model.layers.N.".
TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
OF_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.router.weight": "mlp.gate.weight",
    "feed_forward.experts.w_gate_up": "mlp.experts.gate_up_proj",
    "feed_forward.experts.w_down": "mlp.experts.down_proj",
}


def mixtral_names(decoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of a decoder of Mixtral's shape under the name that transformers gives it."""
    for name, weight in decoder.state_dict().items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            yield f"model.layers.{number}.{OF_LAYER[rest]}", weight
        else:
            yield f"{TOP[name.removesuffix('.weight')]}.weight", weight


def mixtral_model(decoder: Any, implementation: str) -> Any:
    """Return transformers' MixtralForCausalLM that holds the very tensors of `decoder`, a Decoder whose
    layers are all SwiGLU experts; `implementation` is one of its names for how experts are computed.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    block = decoder.layers[0]
    layer, weight = block.feed_forward, decoder.embedding.weight
    config = MixtralConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.width,
        intermediate_size=layer.experts.w_down.shape[-1],
        num_hidden_layers=len(decoder.layers),
        num_attention_heads=block.attention.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.num_selected,
        max_position_embeddings=decoder.context,
        rms_norm_eps=decoder.norm.eps,
        rope_parameters={"rope_theta": decoder.rotary.theta, "rope_type": "default"},
        tie_word_embeddings=False,
        dtype=weight.dtype,
    )
    model = MixtralForCausalLM(config).eval()
    # Assigned, not copied: two sides of a race would not fit the memory twice, nor differ in where they lie.
    model.load_state_dict(dict(mixtral_names(decoder)), assign=True)
    model.set_experts_implementation(implementation)
    return model


class TransformersDecoder:
    """transformers' model and its cache: `begin` reads prompts [B, S], `step` one id per row [B, 1], each
    giving logits [B, V] after the last id; `rewind` forgets what came after the prompts.

    `compiled`: the static cache, and steps through torch.compile, as `cache_implementation="static"` does.
    """

    def __init__(self, decoder: Any, implementation: str, capacity: int, compiled: bool = False) -> None:
        self.model = mixtral_model(decoder, implementation)
        self.capacity, self.compiled = capacity, compiled
        self._step: Any = None if compiled else self.model
        self.cache: Any = None
        self.length = 0

    def begin(self, prompts: Tensor) -> Tensor:
        """Return the logits after `prompts` [B, S], which a new cache then holds."""
        from transformers import DynamicCache, StaticCache

        config, self.length = self.model.config, prompts.shape[1]
        self.cache = StaticCache(config, self.capacity) if self.compiled else DynamicCache(config=config)
        return self._last(self.model, prompts)

    def step(self, ids: Tensor) -> Tensor:
        """Return the logits after one more id per row."""
        if self._step is None:
            self._step = torch.compile(self.model, dynamic=False)
        return self._last(self._step, ids)

    def _last(self, model: Any, ids: Tensor) -> Tensor:
        found = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = found.logits[:, -1]
        return logits

    @torch.inference_mode()
    def rewind(self) -> None:
        """Return to the end of the prompts."""
        if not self.compiled:
            behind = self.cache.get_seq_length() - self.length
            if behind:
                self.cache.crop(-behind)
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)
