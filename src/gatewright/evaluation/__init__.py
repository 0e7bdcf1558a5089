"""How good a model is, and what it would cost."""

from gatewright.evaluation.bits import Bits, bits_per_byte, take_bytes

__all__ = ["Bits", "bits_per_byte", "take_bytes"]
