"""How good a model is, and what it would cost."""

from gatewright.evaluation.bits import Bits, bits_per_byte, take_bytes
from gatewright.evaluation.distilled import compression, gain_kept
from gatewright.evaluation.masked_bits import masked_bits_per_byte

__all__ = ["Bits", "bits_per_byte", "compression", "gain_kept", "masked_bits_per_byte", "take_bytes"]
