"""One row of a result: from the raw seconds of its sides to ratios, and the refusal of a noisy one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gatewright.measuring.grid import Cell, Shape
from gatewright.measuring.rounds import Middle, best_of_rounds, middle, paired, spread
from gatewright.measuring.sides import DENSE, FEW, LINEAR, OURS, TRANSFORMERS

Row = dict[str, Any]
# Above this spread of the plain dense side, a ratio says more about the machine than about the layers.
LARGEST_SPREAD = 0.25


def row_record(
    cell: Cell,
    seconds: Mapping[str, Sequence[float]],
    left_out: Mapping[str, str],
    roofline: Callable[[Shape], float],
) -> Row:
    """Return a row as plain data; every ratio is the median of the rounds' own ratios. `roofline` gives the
    seconds of a shape.
    """
    theirs = [name for name in TRANSFORMERS if name in seconds]
    ours, dense = seconds[OURS], best_of_rounds(seconds, [name for name in DENSE if name in seconds])
    best = best_of_rounds(seconds, theirs) if theirs else None
    roof = roofline(cell.shape)
    ratios: dict[str, Middle | None] = {
        "dense": paired(ours, dense),
        "transformers": paired(ours, best) if best else None,
        "transformers_over_dense": paired(best, dense) if best else None,
        "roofline": middle([taken / roof for taken in ours]),
        "fewest_experts": paired(ours, seconds[FEW]) if FEW in seconds else None,
    }
    spreads = {name: spread(values) for name, values in seconds.items()}
    return {
        "name": cell.shape.name,
        "shape": cell.shape._asdict(),
        "fewest_experts": cell.few.num_experts if cell.few else None,
        "dtype": cell.dtype,
        "pass": cell.kind,
        "refused": refusal(spreads[LINEAR]),
        "ratios": {name: ratio and ratio._asdict() for name, ratio in ratios.items()},
        "spread": spreads,
        "roofline_seconds": roof,
        "roofline_fewest_seconds": roofline(cell.few) if cell.few else None,
        "left_out": dict(left_out),
        "memory": None,
        "profile": None,
        "seconds": {name: list(values) for name, values in seconds.items()},
    }


def refusal(dense_spread: float) -> str | None:
    """Return why a row's ratios are not to be used, or None."""
    if dense_spread <= LARGEST_SPREAD:
        return None
    return (
        f"the dense side alone spread by {100 * dense_spread:.0f} % (at most {100 * LARGEST_SPREAD:.0f} %); "
        "the machine is busy"
    )
