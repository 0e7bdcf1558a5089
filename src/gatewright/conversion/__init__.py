"""Other libraries' models and this toolkit: its experts in transformers, T5 and Switch read, int8 experts."""

from gatewright.conversion.experts import experts_forward
from gatewright.conversion.install import NOT_COVERED, Placed, register_experts, use_in_transformers
from gatewright.conversion.quantise import quantise_experts
from gatewright.conversion.t5 import from_t5, load_t5

__all__ = [
    "NOT_COVERED",
    "Placed",
    "experts_forward",
    "from_t5",
    "load_t5",
    "quantise_experts",
    "register_experts",
    "use_in_transformers",
]
