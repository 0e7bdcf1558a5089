"""Measuring: what layers, routers and decoded tokens cost on this machine, sides alternating."""

from .decode import bench_decode
from .decode_run import DecodeResult, DecodeRun
from .grid import GRID, QUICK, Shape
from .layer import bench_layer
from .result import BenchResult
from .routers import RoutersRun, bench_routers
from .run import BenchRun

__all__ = [
    "GRID",
    "QUICK",
    "BenchResult",
    "BenchRun",
    "DecodeResult",
    "DecodeRun",
    "RoutersRun",
    "Shape",
    "bench_decode",
    "bench_layer",
    "bench_routers",
]
