"""gatewright: Mixture-of-Experts for PyTorch: parts that can be trained, raced and seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewright.loading import load as load
    from gatewright.parts import MoELayer, RouterStats, Stats, attach_loss, balance_loss, z_loss

__version__ = "0.1.0"
__all__ = ["MoELayer", "RouterStats", "Stats", "attach_loss", "balance_loss", "z_loss"]


def __getattr__(name: str) -> Any:
    # The names arrive on first use: `gatewright --help` answers without waiting for torch.
    if name == "load":
        from gatewright.loading import load as load

        return load
    if name in __all__:
        import gatewright.parts

        return getattr(gatewright.parts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
