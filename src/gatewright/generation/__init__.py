"""Continue texts and conversations with a decoder: sampling, a key-value cache, stop texts, chat."""

from gatewright.evaluation.undropped import for_generation
from gatewright.generation.reader import Reader
from gatewright.generation.sampling import Sampling, next_probabilities
from gatewright.generation.steps import generate, stream
from gatewright.generation.text import StopTexts, TextStream

__all__ = [
    "Reader",
    "Sampling",
    "StopTexts",
    "TextStream",
    "for_generation",
    "generate",
    "next_probabilities",
    "stream",
]
