"""Measuring: what a layer and a router cost on this machine, sides alternating, every raw time kept."""

from .grid import GRID, QUICK, Shape
from .layer import bench_layer
from .result import BenchResult
from .routers import RoutersRun, bench_routers
from .run import BenchRun
from .step_memory import StepMemory, step_memory

__all__ = [
    "GRID",
    "QUICK",
    "BenchResult",
    "BenchRun",
    "RoutersRun",
    "Shape",
    "StepMemory",
    "bench_layer",
    "bench_routers",
    "step_memory",
]
