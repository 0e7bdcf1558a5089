"""The tensors of a checkpoint by their classic names, whatever layout they are stored in.

| stored | what is made of it |
|---|---|
| one matrix per expert | as it is |
| `experts.gate_up_proj` [E, 2F, D] or turned [E, D, 2F], `experts.down_proj` | one expert's part |
| the same of gpt-oss (gate and up in turn) and Llama 4, which have no other | as it is, turned |
| FP8 with a `weight_scale_inv` per block (DeepSeek-V3) | fp32, weight * scale of its block |
| MXFP4 `_blocks` and `_scales` (gpt-oss) | bf16, exactly |
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gatewright.errors import UserError

# The sixteen values of a 4-bit float with 2 bits of exponent and 1 of mantissa (OCP MX v1.0, table 5).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
_PLACE = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
# What an encoder of images brings: the text part does without.
_BESIDE = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")


class Stored:
    """Tensors by classic names; remembers which of the stored ones were taken, so that none gets lost.

    Args: `blocks` is the size of an FP8 scale's block. `left_out` are those of a part that is not read.
    """

    def __init__(self, tensors: Mapping[str, Tensor], blocks: tuple[int, int] = (128, 128)) -> None:
        self._tensors, self._blocks = tensors, blocks
        self.left_out = tuple(sorted(name for name in tensors if name.startswith(_BESIDE)))
        beside = set(self.left_out)
        self._by_name = {_text_name(name): name for name in tensors if name not in beside}
        self._taken: set[str] = set()

    @property
    def names(self) -> frozenset[str]:
        """The stored names, those of the text part."""
        return frozenset(self._by_name)

    def has(self, name: str) -> bool:
        """Return whether a tensor is stored under this very name."""
        return name in self._by_name

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor that the classic name stands for. Raises: UserError where there is none, and for
        one of another shape.
        """
        found = self._find(name, shape)
        if found is None:
            raise UserError(_missing(name))
        if tuple(found.shape) != shape:
            raise UserError(
                f"tensor {name} is {list(found.shape)}; allowed: {list(shape)}, as config.json says; "
                "check that the two belong together"
            )
        return found

    def finish(self, tied: bool) -> None:
        """Check that nothing was left. Raises: UserError naming what belongs nowhere."""
        left = sorted(name for name in self.names - self._taken if not name.endswith("rotary_emb.inv_freq"))
        if tied and "lm_head.weight" in left:
            # Stored again, though it is the embedding: as long as it is.
            if not torch.equal(self._get("lm_head.weight"), self._get("model.embed_tokens.weight")):
                raise UserError(
                    "lm_head.weight differs from the embedding, which config.json ties it to; allowed: equal "
                    'ones, or "tie_word_embeddings": false'
                )
            left.remove("lm_head.weight")
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UserError(
                f"tensor {left[0]}{more} belongs nowhere; allowed: the tensors of the model that config.json "
                "describes; check that the two belong together"
            )

    def dtype(self, name: str) -> torch.dtype:
        """Return what a classic name is stored as, bf16 where it is quantised, without reading it; it counts
        as taken. Raises: UserError where there is none.
        """
        place = self._locate(name)
        if place is None:
            raise UserError(_missing(name))
        found = self._get(place if place in self._by_name else f"{place}_blocks")
        for companion in ("_scales", "_scale_inv"):
            if f"{place}{companion}" in self._by_name:
                self._get(f"{place}{companion}")
        quantised = found.dtype in (torch.uint8, torch.float8_e4m3fn)
        return torch.bfloat16 if quantised else found.dtype

    def _get(self, name: str) -> Tensor:
        self._taken.add(name)
        return self._tensors[self._by_name[name]]

    def _locate(self, name: str) -> str | None:
        """Return the stored name, less an ending of MXFP4, that a classic one is read from."""
        for own in (name, name.replace(".block_sparse_moe.", ".mlp.")):
            matched = _EXPERT.fullmatch(own)
            fused = _fused_names(matched[1], matched[3]) if matched else ()
            for place in (own, *fused):
                if place in self._by_name or f"{place}_blocks" in self._by_name:
                    return place
        return None

    def _find(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        place = self._locate(name)
        if place is None:
            return None
        if place not in self._by_name:
            return from_mxfp4(self._get(f"{place}_blocks"), self._get(f"{place}_scales")).mT
        found, matched = self._plain(place), _EXPERT.fullmatch(name)
        if matched is None or _EXPERT.fullmatch(place):
            return self._turned(found, shape)
        return _one_expert(found[int(matched[2])], matched[3], shape)

    def _plain(self, name: str) -> Tensor:
        """Return a stored tensor, dequantised where it is FP8."""
        found = self._get(name)
        if found.dtype != torch.float8_e4m3fn:
            return found
        if f"{name}_scale_inv" not in self._by_name:
            raise UserError(f"tensor {name} is FP8 without {name}_scale_inv; allowed: scaled by blocks")
        return from_fp8(found, self._get(f"{name}_scale_inv"), self._blocks)

    def _turned(self, found: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return all experts turned where they are stored the other way round; square ones never."""
        turned = found.dim() == 3 and tuple(found.shape) != shape and tuple(found.mT.shape) == shape
        return found.mT if turned else found


def _missing(name: str) -> str:
    return (
        f"tensor {name} is not there; allowed: all tensors of the model that config.json describes; get the "
        "folder's other files"
    )


def _fused_names(place: str, part: str) -> tuple[str, str]:
    name = f"{place}.{'gate_up_proj' if part in _PLACE else 'down_proj'}"
    return name, f"{name}.weight"


def _one_expert(own: Tensor, part: str, shape: tuple[int, ...]) -> Tensor:
    """Return an expert's matrix of `shape` out of its gate_up [2F, D] or down [D, F], or one turned."""
    whole = (2 * shape[0], shape[1]) if part in _PLACE else shape
    # Both orders fit a square one; then it is transformers' own.
    own = own.mT if tuple(own.shape) != whole and tuple(own.mT.shape) == whole else own
    return own.chunk(2)[_PLACE[part]] if part in _PLACE else own


def _text_name(name: str) -> str:
    """Return a name of the text part as a text model has it."""
    if name.startswith("model.language_model."):
        return f"model.{name.removeprefix('model.language_model.')}"
    return name.removeprefix("language_model.")


def from_fp8(weight: Tensor, scale: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Return an FP8 matrix [N, M] times the scale of each block, [ceil(N / n), ceil(M / m)], in fp32.

    Raises: UserError where there are not so many scales.
    """
    rows, columns = weight.shape
    if tuple(scale.shape) != (-(-rows // blocks[0]), -(-columns // blocks[1])):
        raise UserError(
            f"FP8 scales of {list(scale.shape)} for a weight of {list(weight.shape)} in blocks of "
            f"{list(blocks)}; allowed: one for each block"
        )
    wide = scale.float().repeat_interleave(blocks[0], 0)[:rows].repeat_interleave(blocks[1], 1)[:, :columns]
    return weight.float() * wide


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return what MXFP4 holds: blocks [..., N, 16] of two 4-bit floats a byte, the low half first, times
    2 ** (scale - 127), scales [..., N]: [..., 32 N] in bf16, which holds them exactly.
    """
    table = torch.tensor(_FP4, dtype=torch.bfloat16)
    out = torch.empty(*blocks.shape[:-2], blocks.shape[-2] * 32, dtype=torch.bfloat16)
    # One expert at a time: the indices are eight times as large as what they look up.
    for whole, packed, scale in zip(out, blocks, scales, strict=True):
        pairs = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        exact = torch.ldexp(table[pairs.int()].float(), scale.int().unsqueeze(-1) - 127)
        whole.copy_(exact.flatten(-2))
    return out
