"""Other libraries' models and this toolkit: its experts inside transformers, what their routers choose,
balance on adopted checkpoints, released decoders, T5 and Switch read, and experts in int8.
"""

from gatewright.conversion.balance import (
    ADOPTED_LOSSES,
    AttachedBalance,
    AttachedBias,
    attach_balance,
    attach_bias,
    sum_over_ranks,
    trainer_callback,
)
from gatewright.conversion.decoders import from_hf, load_decoder
from gatewright.conversion.experts import experts_forward
from gatewright.conversion.families import FAMILIES
from gatewright.conversion.folder import read_config
from gatewright.conversion.install import NOT_COVERED, Placed, register_experts, use_in_transformers
from gatewright.conversion.padding import read_padded
from gatewright.conversion.recorder import RecordedModel, RouterRecorder
from gatewright.conversion.routers import NOT_RECORDED, RouterSite, router_sites
from gatewright.conversion.t5 import MODELS, from_t5, load_t5
from gatewright.parts.quantise import quantise_experts

__all__ = [
    "ADOPTED_LOSSES",
    "FAMILIES",
    "MODELS",
    "NOT_COVERED",
    "NOT_RECORDED",
    "AttachedBalance",
    "AttachedBias",
    "Placed",
    "RecordedModel",
    "RouterRecorder",
    "RouterSite",
    "attach_balance",
    "attach_bias",
    "experts_forward",
    "from_hf",
    "from_t5",
    "load_decoder",
    "load_t5",
    "quantise_experts",
    "read_config",
    "read_padded",
    "register_experts",
    "router_sites",
    "sum_over_ranks",
    "trainer_callback",
    "use_in_transformers",
]
