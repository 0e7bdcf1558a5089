"""The rows of the speed grid: shapes of one expert layer, and what each of them has to compute and read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

from gatewright.errors import UserError

Dtype = Literal["fp32", "bf16"]
Pass = Literal["forward", "forward-backward"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    """T tokens, D width, F expert width, E experts, K selected."""

    tokens: int
    width: int
    expert_width: int
    num_experts: int
    num_selected: int

    @property
    def name(self) -> str:
        """The shape as `--rows` takes it: TxDxFxExK."""
        return "x".join(map(str, self))


class Cell(NamedTuple):
    """One measurement: a shape in one dtype and one pass; `few` is the same shape with fewest experts."""

    shape: Shape
    dtype: Dtype
    kind: Pass
    few: Shape | None


# At 256 experts and 2 choices each, 16,384 tokens give every expert 128 rows.
MANY_TOKENS, EXPERT_COUNTS, WIDTHS = 16_384, (8, 64, 256), ((128, 256), (64, 128), (256, 512))
GRID: tuple[Shape, ...] = (
    Shape(2048, 512, 1024, 8, 2),
    Shape(2048, 512, 128, 64, 8),
    Shape(4096, 256, 512, 64, 1),
    Shape(4096, 128, 256, 16, 2),
    Shape(4096, 64, 128, 64, 1),
    *(Shape(MANY_TOKENS, d, f, e, 2) for d, f in WIDTHS for e in EXPERT_COUNTS),
)
# Large enough that transformers' batched_mm, which takes a hundred times as long, is left out.
QUICK: tuple[Shape, ...] = (
    Shape(4096, 128, 256, 8, 2),
    Shape(4096, 128, 256, 64, 2),
    Shape(8192, 128, 256, 16, 1),
)


def parse_shape(text: str) -> Shape:
    """Return the shape that `text` (TxDxFxExK) names. Raises: UserError for anything else."""
    try:
        shape = Shape(*map(int, text.split("x")))
    except (TypeError, ValueError):
        raise UserError(
            f"row {text!r}; allowed: five whole numbers as TxDxFxExK (tokens, width, expert width, experts, "
            f"selected), for example {GRID[0].name}"
        ) from None
    if min(shape) < 1 or shape.num_selected > shape.num_experts:
        raise UserError(
            f"row {text!r}; allowed: numbers of 1 or more, and at most as many selected as there are experts"
        )
    return shape


def fewest(shape: Shape, rows: Iterable[Shape]) -> Shape | None:
    """Return the row that differs from `shape` in its experts only and has the fewest; None if none has
    fewer.
    """
    alike = [row for row in rows if row._replace(num_experts=shape.num_experts) == shape]
    least = min(alike, key=lambda row: row.num_experts, default=shape)
    return least if least.num_experts < shape.num_experts else None


def dense_width(shape: Shape) -> int:
    """Return the dense layer's hidden width: K F, widened by the router's FLOPs (2 D E over 6 D per unit
    of width).
    """
    return shape.num_selected * shape.expert_width + round(shape.num_experts / 3)


def passes(kind: Pass) -> int:
    """Return how often each matmul's FLOPs are spent: once, and twice more for the two gradients."""
    return 3 if kind == "forward-backward" else 1


def expert_flops(shape: Shape, kind: Pass) -> int:
    """Return the FLOPs of the experts' three matmuls: 2 D F each, K per token."""
    return passes(kind) * shape.tokens * shape.num_selected * 6 * shape.width * shape.expert_width


def router_flops(shape: Shape, kind: Pass) -> int:
    """Return the FLOPs of the router's matmul, 2 D E per token."""
    return passes(kind) * shape.tokens * 2 * shape.width * shape.num_experts


def weight_bytes(shape: Shape, dtype: Dtype) -> int:
    """Return the bytes of all experts' weights."""
    return 3 * shape.num_experts * shape.width * shape.expert_width * DTYPES[dtype].itemsize


def gathered_bytes(shape: Shape, dtype: Dtype) -> int:
    """Return the bytes of a copy of its experts' weights for every choice of every token: T K 3 F D."""
    return shape.tokens * shape.num_selected * weight_bytes(shape, dtype) // shape.num_experts
