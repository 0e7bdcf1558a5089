"""Training: the loop, its optimizer, schedules and precision, checkpoints that survive, and logs."""

from gatewright.training.allocator import keep_big_blocks
from gatewright.training.run import LoopSettings, TrainRun
from gatewright.training.schedule import SCHEDULES, rate_factor

__all__ = ["SCHEDULES", "LoopSettings", "TrainResult", "TrainRun", "keep_big_blocks", "rate_factor", "train"]


def __getattr__(name: str) -> object:
    # The loop brings the report's code with it: loaded when a run starts, not when its settings are parsed.
    if name in ("train", "TrainResult"):
        from gatewright.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
