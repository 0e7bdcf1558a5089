"""Other libraries' models and this toolkit: its experts inside transformers."""

from gatewright.conversion.experts import experts_forward
from gatewright.conversion.install import NOT_COVERED, Placed, register_experts, use_in_transformers

__all__ = ["NOT_COVERED", "Placed", "experts_forward", "register_experts", "use_in_transformers"]
