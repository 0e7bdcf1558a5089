"""Backbones: what the mixtures sit in."""

from gatewright.backbones import initialise
from gatewright.backbones.ahead import AheadReader
from gatewright.backbones.assemble import feed_forwards, gated_router, latent_decoder
from gatewright.backbones.attention import Attention, LayerCache, RotaryPositions
from gatewright.backbones.cases import HiddenLayer, Mixture, MixtureOutput
from gatewright.backbones.cost import Cost, count_cost, on_no_memory
from gatewright.backbones.deep import DeepMLP, dense_layer
from gatewright.backbones.deep_mixture import DeepMixture, DeepOutput
from gatewright.backbones.encoder_decoder import EncoderDecoder, PairCache
from gatewright.backbones.future import FutureToken
from gatewright.backbones.latent import LatentAttention, LatentSizes
from gatewright.backbones.lstm import LanguageModel, LSTMCache, LSTMDecoder, RecurrentBlock
from gatewright.backbones.lstm_attention import SourceAttention
from gatewright.backbones.lstm_pair import PairModel, RecurrentEncoderDecoder
from gatewright.backbones.norm import RMSNorm
from gatewright.backbones.pattern import moe_pattern, per_layer
from gatewright.backbones.scaling import RopeScaling
from gatewright.backbones.transformer import Block, Decoder, DecoderOutput, KVCache
from gatewright.backbones.tree import ExpertTree

__all__ = [
    "AheadReader",
    "Attention",
    "Block",
    "Cost",
    "Decoder",
    "DecoderOutput",
    "DeepMLP",
    "DeepMixture",
    "DeepOutput",
    "EncoderDecoder",
    "ExpertTree",
    "FutureToken",
    "HiddenLayer",
    "KVCache",
    "LSTMCache",
    "LSTMDecoder",
    "LanguageModel",
    "LatentAttention",
    "LatentSizes",
    "LayerCache",
    "Mixture",
    "MixtureOutput",
    "PairCache",
    "PairModel",
    "RMSNorm",
    "RecurrentBlock",
    "RecurrentEncoderDecoder",
    "RopeScaling",
    "RotaryPositions",
    "SourceAttention",
    "count_cost",
    "dense_layer",
    "feed_forwards",
    "gated_router",
    "initialise",
    "latent_decoder",
    "moe_pattern",
    "on_no_memory",
    "per_layer",
]
