"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "wsd", "inverse_sqrt")


def rate_factor(
    schedule: str,
    step: int,
    progress: float,
    *,
    warmup_steps: int,
    decay_share: float = 0.4,
    final_rate: float = 0.0,
) -> float:
    """Return the learning rate of 0-based `step` as a share of the peak.

    Args: `progress` is the share of the run done before this step, 0 to 1 (by tokens, or by the clock where
    that is ahead). constant: 1 after warm-up. cosine: from 1 down to `final_rate`. wsd: 1 until the last
    `decay_share` of the run, then linearly to `final_rate`. inverse_sqrt: sqrt(warmup / step) after warm-up
    (Vaswani et al. 2017).
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "cosine":
        return warm * (final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "wsd" and decay_share > 0:
        into_decay = max(0.0, (progress - (1 - decay_share)) / decay_share)
        return warm * (1 - (1 - final_rate) * into_decay)
    if schedule == "inverse_sqrt":
        start = max(warmup_steps, 1)
        return warm * math.sqrt(start / max(step + 1, start))
    return warm
