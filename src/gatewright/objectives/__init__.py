"""What a model is trained towards: a task loss plus the named losses over its routers' Stats."""

from gatewright.objectives.likelihood import CaseLikelihood
from gatewright.objectives.mixture import CaseError
from gatewright.objectives.next_token import Loss, NextToken, check_weights

__all__ = ["CaseError", "CaseLikelihood", "Loss", "NextToken", "check_weights"]
