"""What a model is trained towards: a task loss plus the named losses over its routers' Stats."""

from gatewright.objectives.classes import ClassLoss
from gatewright.objectives.mixture import CaseError
from gatewright.objectives.next_token import Loss, NextToken

__all__ = ["CaseError", "ClassLoss", "Loss", "NextToken"]
