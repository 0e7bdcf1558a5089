"""Backbones: what the mixtures sit in."""

from gatewright.backbones import initialise
from gatewright.backbones.attention import Attention, LayerCache, RotaryPositions
from gatewright.backbones.cases import HiddenLayer, Mixture, MixtureOutput
from gatewright.backbones.cost import Cost, count_cost, on_no_memory
from gatewright.backbones.deep import DeepMLP, dense_layer
from gatewright.backbones.lstm import LanguageModel, LSTMCache, LSTMDecoder, RecurrentBlock
from gatewright.backbones.norm import RMSNorm
from gatewright.backbones.pattern import moe_pattern, per_layer
from gatewright.backbones.transformer import Block, Decoder, DecoderOutput, KVCache
from gatewright.backbones.tree import ExpertTree

__all__ = [
    "Attention",
    "Block",
    "Cost",
    "Decoder",
    "DecoderOutput",
    "ExpertTree",
    "DeepMLP",
    "HiddenLayer",
    "KVCache",
    "LSTMCache",
    "LSTMDecoder",
    "LanguageModel",
    "LayerCache",
    "Mixture",
    "MixtureOutput",
    "RMSNorm",
    "RecurrentBlock",
    "RotaryPositions",
    "count_cost",
    "dense_layer",
    "initialise",
    "moe_pattern",
    "on_no_memory",
    "per_layer",
]
