"""Measuring: what layers, routers, training steps and decoded tokens cost here, sides alternating."""

from .decode import bench_decode
from .decode_run import DecodeResult, DecodeRun
from .grid import GRID, QUICK, Shape
from .layer import bench_layer
from .result import BenchResult
from .routers import RoutersRun, bench_routers
from .run import BenchRun
from .step import StepRun, bench_step
from .step_memory import StepMemory, step_memory

__all__ = [
    "GRID",
    "QUICK",
    "BenchResult",
    "BenchRun",
    "DecodeResult",
    "DecodeRun",
    "RoutersRun",
    "Shape",
    "StepMemory",
    "StepRun",
    "bench_decode",
    "bench_layer",
    "bench_routers",
    "bench_step",
    "step_memory",
]
