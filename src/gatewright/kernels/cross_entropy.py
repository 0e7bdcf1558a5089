"""Cross-entropy of rows of logits that have one right answer each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.kernels import native
from gatewright.kernels.native.step import CrossEntropy


def cross_entropy(logits: Float[Tensor, "T V"], targets: Int64[Tensor, "T"]) -> Float[Tensor, ""]:
    """Return the mean over tokens of -log softmax(logits)[target] in nats, in at least fp32, 0-d.

    Raises: IndexError for a target that is no column.
    """
    if native.runs_for(logits) and targets.device.type == "cpu":
        loss: Tensor = CrossEntropy.apply(logits.contiguous(), targets.contiguous())
        return loss
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets)
