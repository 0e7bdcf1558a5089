"""What a model is trained towards: a task loss plus the named losses over its routers' Stats."""

from gatewright.objectives.mixture import CaseError
from gatewright.objectives.next_token import Loss, NextToken
from gatewright.objectives.spans import Pair, SpanCorruption, Spans

__all__ = ["CaseError", "Loss", "NextToken", "Pair", "SpanCorruption", "Spans"]
