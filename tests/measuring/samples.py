"""Small rows and made-up seconds for the tests of measuring."""

from __future__ import annotations

from typing import Any

from gatewright.measuring.grid import Cell, Shape
from gatewright.measuring.record import row_record
from gatewright.measuring.roofline import Machine
from gatewright.measuring.rounds import Middle
from gatewright.measuring.sides import FEW, KERNEL, LINEAR, OURS

TINY = Shape(tokens=48, width=16, expert_width=8, num_experts=4, num_selected=2)
# 100 FLOP/s in fp32, 200 in bf16, 10 bytes/s.
MACHINE = Machine({"fp32": Middle(100, 90, 110), "bf16": Middle(200, 190, 210)}, Middle(10, 9, 11))
GROUPED = "transformers_grouped_mm"


def row(
    shape: Shape = TINY,
    dtype: Any = "fp32",
    kind: Any = "forward-backward",
    *,
    ours: float = 2.0,
    dense: float = 1.0,
    theirs: float | None = 4.0,
    few: float | None = None,
    noise: float = 0.0,
    roofline: float = 0.5,
) -> dict[str, Any]:
    """Return a row of eleven rounds in which every side takes its seconds, the plain dense one more in half
    of them.
    """
    seconds = {OURS: [ours] * 11, KERNEL: [2 * dense] * 11}
    seconds[LINEAR] = [dense * (1 + noise * (turn % 2)) for turn in range(11)]
    if theirs is not None:
        seconds[GROUPED] = [theirs] * 11
    least = None
    if few is not None:
        seconds[FEW], least = [few] * 11, shape._replace(num_experts=8)
    return {
        **row_record(Cell(shape, dtype, kind, least), seconds, {}, lambda _: roofline),
        "settings": "of a test",
    }
