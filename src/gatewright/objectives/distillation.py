"""Distillation: a student learns from a teacher's probabilities beside the right answers (Hinton et al.
2015).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError
from gatewright.objectives.next_token import Loss


def check_teacher_weight(weight: float) -> float:
    """Return the weight; raise UserError unless it is a share."""
    if not 0 <= weight <= 1:
        raise UserError(
            f"teacher_weight {weight}; allowed: 0 to 1; it is the teacher's share of the task loss"
        )
    return weight


def soft_cross_entropy(logits: Float[Tensor, "*B V"], taught: Float[Tensor, "*B V"]) -> Float[Tensor, ""]:
    """Return the mean over tokens of -sum_v p_v log q_v in nats, q = softmax(logits), p = softmax(taught),
    both in at least fp32. No gradient reaches `taught`.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    probabilities = taught.detach().to(wide).softmax(-1)
    return F.cross_entropy(logits.to(wide).flatten(0, -2), probabilities.flatten(0, -2))


def distilled(
    loss: Loss, logits: Float[Tensor, "*B V"], taught: Float[Tensor, "*B V"], teacher_weight: float
) -> Loss:
    """Return the loss with `teacher_weight` w of its task given to the teacher: total = (1 - w) task + w
    soft_cross_entropy + what else the total had. `task` stays the cross-entropy of the right answers.

    Equation: Switch Transformer section 4.2, w = 0.25 with temperature 1.
    """
    soft = soft_cross_entropy(logits, taught)
    return loss._replace(total=loss.total + check_teacher_weight(teacher_weight) * (soft - loss.task))
