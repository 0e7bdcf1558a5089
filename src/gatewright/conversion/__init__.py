"""Other libraries' models and this toolkit: its experts inside transformers, and experts in int8."""

from gatewright.conversion.experts import experts_forward
from gatewright.conversion.install import NOT_COVERED, Placed, register_experts, use_in_transformers
from gatewright.parts.quantise import quantise_experts

__all__ = [
    "NOT_COVERED",
    "Placed",
    "experts_forward",
    "quantise_experts",
    "register_experts",
    "use_in_transformers",
]
