"""Backbones: what the mixtures sit in."""

from gatewright.backbones import initialise
from gatewright.backbones.attention import Attention, LayerCache, RotaryPositions
from gatewright.backbones.cases import HiddenLayer, Mixture, MixtureOutput
from gatewright.backbones.cost import Cost, count_cost, on_no_memory
from gatewright.backbones.deep_mixture import DeepMixture, DeepOutput
from gatewright.backbones.norm import RMSNorm
from gatewright.backbones.pattern import moe_pattern, per_layer
from gatewright.backbones.transformer import Block, Decoder, DecoderOutput, KVCache

__all__ = [
    "Attention",
    "Block",
    "Cost",
    "Decoder",
    "DecoderOutput",
    "DeepMixture",
    "DeepOutput",
    "HiddenLayer",
    "KVCache",
    "LayerCache",
    "Mixture",
    "MixtureOutput",
    "RMSNorm",
    "RotaryPositions",
    "count_cost",
    "initialise",
    "moe_pattern",
    "on_no_memory",
    "per_layer",
]
