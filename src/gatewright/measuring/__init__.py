"""Measuring: what a layer, a router and a whole training step cost here, sides alternating."""

from .grid import GRID, QUICK, Shape
from .layer import bench_layer
from .result import BenchResult
from .routers import RoutersRun, bench_routers
from .run import BenchRun
from .step import StepRun, bench_step

__all__ = [
    "GRID",
    "QUICK",
    "BenchResult",
    "BenchRun",
    "RoutersRun",
    "Shape",
    "StepRun",
    "bench_layer",
    "bench_routers",
    "bench_step",
]
