"""Measuring: what a layer and a router cost on this machine, sides alternating, every raw time kept."""

from .grid import GRID, QUICK, Shape
from .layer import bench_layer
from .result import BenchResult
from .routers import RoutersRun, bench_routers
from .run import BenchRun

__all__ = ["GRID", "QUICK", "BenchResult", "BenchRun", "RoutersRun", "Shape", "bench_layer", "bench_routers"]
