"""The settings of a speed measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gatewright.errors import UserError
from gatewright.measuring.grid import GRID, QUICK, Cell, Dtype, Pass, Shape, fewest, parse_shape
from gatewright.measuring.rounds import check_rounds

Allocator = Literal["kept", "default"]


@dataclass(frozen=True)
class BenchRun:
    """Time one expert layer against dense layers and transformers, sides alternating."""

    quick: bool = False
    """three small rows, in a minute on two cores, instead of the whole grid"""
    rows: tuple[str, ...] = ()
    """these shapes instead, each as TxDxFxExK: tokens, width, expert width, experts, selected"""
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")
    """of activations and weights"""
    passes: tuple[Pass, ...] = ("forward", "forward-backward")
    """forward as in inference, or both as in training"""
    rounds: int = 15
    """rounds per row, 11 or more; in each of them every side runs once"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    allocator: Allocator = "kept"
    """big blocks of freed memory stay in the process (kept) or go back to the system (default)"""
    backend: str | None = None
    """of our layer and of the dense layer by our kernel; none lets the toolkit choose"""
    keep_gradients: bool = False
    """gradients are set to zero in place between calls, not given up"""
    memory: bool = False
    """measure each side's peak memory too, every side in a process of its own"""
    profile: bool = False
    """say where our layer's time goes too, part by part, by torch's profiler"""
    resume: bool = False
    """keep rows that the folder already holds from the same settings, machine and code"""
    out: str = "runs/bench"
    """folder of the result: layer.json and pictures"""

    def __post_init__(self) -> None:
        from gatewright.kernels import choose_backend

        check_rounds(self.rounds)
        choose_backend(self.backend)
        if self.quick and self.rows:
            raise UserError("--quick with --rows; allowed: one of them; both say which rows are timed")
        for name in ("dtypes", "passes"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; allowed: one value or more")
        self.shapes()

    def shapes(self) -> tuple[Shape, ...]:
        """Return the rows. Raises: UserError for a row that is none."""
        chosen = tuple(map(parse_shape, self.rows)) or (QUICK if self.quick else GRID)
        return tuple(dict.fromkeys(chosen))

    def cells(self) -> list[Cell]:
        """Return every measurement, row by row."""
        shapes = self.shapes()
        return [
            Cell(shape, dtype, kind, fewest(shape, shapes))
            for shape in shapes
            for dtype in dict.fromkeys(self.dtypes)
            for kind in dict.fromkeys(self.passes)
        ]
