"""What a model is trained towards: a task loss plus the named losses over its routers' Stats."""

from gatewright.objectives.classes import ClassLoss
from gatewright.objectives.distillation import check_teacher_weight, distilled, soft_cross_entropy
from gatewright.objectives.likelihood import CaseLikelihood
from gatewright.objectives.mixture import CaseError
from gatewright.objectives.next_token import Loss, NextToken, check_weights
from gatewright.objectives.spans import Pair, SpanCorruption, Spans

__all__ = [
    "CaseError",
    "CaseLikelihood",
    "ClassLoss",
    "Loss",
    "NextToken",
    "Pair",
    "SpanCorruption",
    "Spans",
    "check_teacher_weight",
    "check_weights",
    "distilled",
    "soft_cross_entropy",
]
