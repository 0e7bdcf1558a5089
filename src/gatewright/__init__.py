"""gatewright: Mixture-of-Experts for PyTorch, every milestone from 1991 on as parts that can be trained, raced and seen."""

from gatewright.parts import MoELayer, RouterStats, Stats, attach_loss, balance_loss, z_loss

__version__ = "0.1.0"
__all__ = ["MoELayer", "RouterStats", "Stats", "attach_loss", "balance_loss", "z_loss"]
