"""Causal grouped-query attention with rotary positions, and the cache it decodes from."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from gatewright.backbones.norm import RMSNorm
from gatewright.backbones.scaling import RopeScaling
from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import apply_linears, attend, attend_within, native
from gatewright.kernels.native import attention as native_attention

QK_NORMS = ("none", "head", "width", "unit")


class RotaryPositions(nn.Module):
    """Rotary position embedding (RoPE) of `head_dim` numbers of a head, halves rotated against each other
    (the layout of Llama and Mixtral); `scaling` stretches it over longer texts.
    """

    def __init__(self, head_dim: int, theta: float = 10_000.0, scaling: RopeScaling | str = "none") -> None:
        super().__init__()
        if head_dim % 2:
            raise UserError(
                f"head_dim {head_dim}; allowed: even numbers; rotary positions turn pairs of coordinates"
            )
        if head_dim < 2 or not theta > 0:
            raise UserError(f"head_dim {head_dim}, rope_theta {theta}; allowed: 2 or more, and above 0")
        self.head_dim, self.theta = head_dim, theta
        self.scaling = RopeScaling.parse(scaling) if isinstance(scaling, str) else scaling
        if self.scaling.kind in ("dynamic", "yarn") and (head_dim < 4 or not theta > 1):
            raise UserError(
                f"rope scaling {self.scaling.kind} with head_dim {head_dim}, rope_theta {theta}; allowed: 4 "
                "or more, and above 1"
            )
        # Not buffers: they are no state, follow no module to another device, and stand in no checkpoint.
        self._known: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def angles(
        self, start: int, length: int, device: torch.device
    ) -> tuple[Float64[Tensor, "S head_dim"], Float64[Tensor, "S head_dim"]]:
        """Return cos and sin, each [length, head_dim] fp64, for positions start .. start + length - 1.

        Equation: angle(p, i) = p * theta ** (-2 i / head_dim), i = 0 .. head_dim / 2 - 1; RopeScaling has the
        others.
        """
        frequency = self.scaling.frequencies(self.theta, self.head_dim, start + length, device)
        position = torch.arange(start, start + length, device=device, dtype=torch.float64)
        angle = torch.outer(position, frequency).repeat(1, 2)
        size = self.scaling.magnitude
        return (angle.cos(), angle.sin()) if size == 1 else (angle.cos() * size, angle.sin() * size)

    def tables(
        self, start: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "S head_dim"], Float[Tensor, "S head_dim"]]:
        """Return `angles` in `dtype`; computed once for each device and dtype, and again for longer texts."""
        # "dynamic" has other angles for each length, so no table of a longer text serves a shorter one.
        anew = self.scaling.kind == "dynamic"
        if anew or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            cos, sin = self.angles(start, length, device)
            return cos.to(dtype), sin.to(dtype)
        end, key = start + length, (device, dtype)
        if key not in self._known or self._known[key][0].shape[0] < end:
            # Tensors made in inference mode could not enter a later training step.
            with torch.inference_mode(False):
                cos, sin = (one.to(dtype) for one in self.angles(0, 1 << (end - 1).bit_length(), device))
            if type(cos) is not Tensor:  # a tracer's, which must not outlive it
                return cos[start:end], sin[start:end]
            self._known[key] = cos, sin
        cos, sin = self._known[key]
        return cos[start:end], sin[start:end]


def rotate(
    x: Float[Tensor, "B H S head_dim"], cos: Float[Tensor, "S head_dim"], sin: Float[Tensor, "S head_dim"]
) -> Float[Tensor, "B H S head_dim"]:
    """Return x [B, H, S, head_dim] turned by its positions' angles, in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def rotate_pair(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv S head_dim"],
    cos: Float[Tensor, "S head_dim"],
    sin: Float[Tensor, "S head_dim"],
) -> tuple[Float[Tensor, "B H S head_dim"], Float[Tensor, "B Hkv S head_dim"]]:
    """Return q and k as `rotate` turns them; natively in one pass, whose products bf16 does not round."""
    if native.runs_for(q, k, cos):
        return native_attention.rotate_pair(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def turn_pair(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv S head_dim"],
    cos: Float[Tensor, "S rotary"],
    sin: Float[Tensor, "S rotary"],
    interleaved: bool = False,
) -> tuple[Float[Tensor, "B H S head_dim"], Float[Tensor, "B Hkv S head_dim"]]:
    """Return q and k with their first `rotary` numbers turned as by `rotate_pair`, the others as they are.

    Args: `interleaved` says that coordinates 2 i and 2 i + 1 are a pair, as in DeepSeek and Llama 4, and not
    i and i + rotary / 2; what is returned has them apart, in q and k alike, which no score can tell.
    """
    size = cos.shape[-1]
    if size > q.shape[-1]:
        raise UserError(f"{size} rotary numbers in heads of {q.shape[-1]}; allowed: at most the head's size")
    first = [x[..., :size] for x in (q, k)]
    if interleaved:
        first = [torch.cat([x[..., ::2], x[..., 1::2]], dim=-1) for x in first]
    turned = rotate_pair(first[0], first[1], cos, sin)
    if size == q.shape[-1]:
        return turned
    return torch.cat([turned[0], q[..., size:]], dim=-1), torch.cat([turned[1], k[..., size:]], dim=-1)


class LayerCache:
    """Keys and values of one layer, [B, Hkv, capacity, ...], filled from the left. Latent attention keeps its
    latents as keys, and values of size 0.
    """

    def __init__(
        self,
        keys: Float[Tensor, "B Hkv capacity head_dim"],
        values: Float[Tensor, "B Hkv capacity value_dim"],
    ) -> None:
        self.keys, self.values, self.length = keys, values, 0

    def append(
        self, keys: Float[Tensor, "B Hkv S head_dim"], values: Float[Tensor, "B Hkv S value_dim"]
    ) -> tuple[Float[Tensor, "B Hkv P head_dim"], Float[Tensor, "B Hkv P value_dim"]]:
        """Store [B, Hkv, S, head_dim] behind what is there; return everything stored so far."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise UserError(
                f"{end} positions in a cache of {self.keys.shape[2]}; allowed: up to its capacity; make "
                "the cache larger or the text shorter"
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention with H query and Hkv key/value heads: x [B, S, D] -> [B, S, D].

    Args: `qk_norm`: "none"; "head" (RMSNorm on each head, Qwen3); "width" (RMSNorm over all heads' width
    before the split, OLMoE); "unit" (on each head, without a weight and after its rotation, Llama 4).
    `bias`, `output_bias`: of queries, keys and values (Qwen2), and of the output too (gpt-oss). `window`,
    `chunked`, `sinks` as `attend_within`, a sink per query head being learned. `rotary` False leaves
    positions out; `interleaved` as `turn_pair`. `temperature` (f, a) multiplies the query at position p by
    1 + a ln(1 + floor((p + 1) / f)) (Llama 4's layers without positions).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: str = "none",
        norm_eps: float = 1e-5,
        bias: bool = False,
        output_bias: bool = False,
        window: int | None = None,
        chunked: bool = False,
        sinks: bool = False,
        rotary: bool = True,
        interleaved: bool = False,
        temperature: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UserError(
                f"num_heads {num_heads} with num_kv_heads {num_kv_heads}; allowed: key/value heads that "
                "divide the heads"
            )
        if qk_norm not in QK_NORMS:
            raise UserError(
                f"qk_norm {qk_norm!r} is unknown{did_you_mean(qk_norm, QK_NORMS)}; allowed: "
                f"{', '.join(QK_NORMS)}"
            )
        if head_dim < 1:
            raise UserError(f"head_dim {head_dim}; allowed: 1 or more")
        if window is not None and window < 1:
            raise UserError(f"window {window}; allowed: 1 or more, or none for all of the past")
        self.num_heads, self.num_kv_heads, self.head_dim, self.qk_norm = (
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm,
        )
        self.window, self.chunked, self.rotary, self.interleaved = window, chunked, rotary, interleaved
        self.temperature, self.norm_eps = temperature, norm_eps
        self.query = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.output = nn.Linear(num_heads * head_dim, width, bias=output_bias)
        if qk_norm in ("head", "width"):
            per_head = qk_norm == "head"
            self.query_norm = RMSNorm(head_dim if per_head else num_heads * head_dim, norm_eps)
            self.key_norm = RMSNorm(head_dim if per_head else num_kv_heads * head_dim, norm_eps)
        for own in (linear.bias for linear in self.projections):
            if own is not None:
                nn.init.zeros_(own)
        # At 0 a sink counts as one key whose score is 0.
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """The linear maps, each met by every token."""
        return self.query, self.key, self.value, self.output

    @property
    def numbers_per_pair(self) -> int:
        """Numbers that a query multiplies with a key and its value, over all heads."""
        return 2 * self.num_heads * self.head_dim

    @property
    def cached_numbers(self) -> int:
        """Numbers that a cache keeps of each token."""
        return 2 * self.num_kv_heads * self.head_dim

    def keys_met(self, context: int) -> float:
        """Return how many keys a token meets on average, in texts of `context` tokens."""
        if self.window is None or self.window >= context:
            return (context + 1) / 2
        if self.chunked:
            whole, rest = divmod(context, self.window)
            return (whole * self.window * (self.window + 1) / 2 + rest * (rest + 1) / 2) / context
        return self.window - self.window * (self.window - 1) / (2 * context)

    def new_cache(
        self, batch: int, capacity: int, like: Float[Tensor, "..."], dtype: torch.dtype
    ) -> LayerCache:
        """Return an empty cache for `batch` texts of up to `capacity` positions, on `like`'s device."""
        shape = (batch, self.num_kv_heads, capacity, self.head_dim)
        return LayerCache(like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype))

    def _heads(
        self, x: Float[Tensor, "B S _"], num_heads: int, norm: RMSNorm | None
    ) -> Float[Tensor, "B H S head_dim"]:
        if norm is not None and self.qk_norm == "width":
            x = norm(x)
        x = x.unflatten(-1, (num_heads, self.head_dim))
        if norm is not None and self.qk_norm == "head":
            x = norm(x)
        return x.transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        cos: Float[Tensor, "S rotary"],
        sin: Float[Tensor, "S rotary"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Return attention over x and, with a cache, over everything before it; the cache is extended."""
        normed = self.qk_norm in ("head", "width")
        queries, keys, values = apply_linears(x, (self.query, self.key, self.value))
        q = self._heads(queries, self.num_heads, self.query_norm if normed else None)
        k = self._heads(keys, self.num_kv_heads, self.key_norm if normed else None)
        v = self._heads(values, self.num_kv_heads, None)
        past = 0 if cache is None else cache.length
        if self.rotary:
            q, k = turn_pair(q, k, cos, sin, self.interleaved)
        if self.qk_norm == "unit":
            q, k = (unit_norm(one, self.norm_eps) for one in (q, k))
        if self.temperature is not None:
            q = q * _temperatures(self.temperature, past, q)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.window is None and self.sinks is None:
            y = attend(q, k, v, past)
        else:
            y = attend_within(q, k, v, past, window=self.window, chunked=self.chunked, sinks=self.sinks)
        (out,) = apply_linears(y.transpose(1, 2).flatten(-2), (self.output,))
        return out


def unit_norm(x: Float[Tensor, "*batch D"], eps: float) -> Float[Tensor, "*batch D"]:
    """Return x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype, computed in at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def _temperatures(settings: tuple[float, float], past: int, q: Tensor) -> Tensor:
    """Return the factor of each query, [S, 1]."""
    floor, share = settings
    places = torch.arange(past + 1, past + q.shape[2] + 1, device=q.device, dtype=torch.float64)
    return (1 + share * torch.log1p(torch.floor(places / floor))).to(q.dtype).unsqueeze(-1)
