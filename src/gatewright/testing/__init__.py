"""The cases that the parts are tested with, for anybody's router, losses and experts: by hand, then slow.

    check_router(my_router, rule="mixtral")
    check_balance(my_loss, loss="balance")
    check_experts(my_experts, activation="swiglu")

Each returns what it found, or raises Mismatch (an AssertionError) that names the case and what was expected.
"""

from gatewright.testing.balance import check_balance
from gatewright.testing.experts import check_experts
from gatewright.testing.factors import CONVENTIONS
from gatewright.testing.report import Difference, Mismatch, Report
from gatewright.testing.router import check_router
from gatewright.testing.rules import RULES
from gatewright.testing.slow_losses import LOSSES

__all__ = [
    "CONVENTIONS",
    "LOSSES",
    "RULES",
    "Difference",
    "Mismatch",
    "Report",
    "check_balance",
    "check_experts",
    "check_router",
]
