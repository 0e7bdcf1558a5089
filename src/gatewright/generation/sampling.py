"""How the next id is drawn: the distribution that the sampling options leave, and one draw from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gatewright.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn."""

    temperature: float = 1.0
    """0 takes the likeliest token; 1 is the model's own distribution"""
    top_p: float = 1.0
    """draw from the likeliest tokens that together have this probability; 1 is all"""
    top_k: int | None = None
    """draw from this many of the likeliest tokens"""
    min_p: float = 0.0
    """draw from tokens that are at least this share as likely as the likeliest; 0 is all"""
    repetition_penalty: float = 1.0
    """above 1, tokens that the text holds already are less likely; 1 is none"""
    seed: int = 0
    """of the draws"""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature}; allowed: 0 (the likeliest id) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}; allowed: above 0, up to 1 (all ids)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k}; allowed: 1 or more, or none (all ids)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p}; allowed: 0 (all ids) to 1 (the likeliest)")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty {self.repetition_penalty}; allowed: above 0; 1 is none")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}; allowed: 0 up to 2**63 - 1")


def next_probabilities(logits: Tensor, sampling: Sampling, text: Tensor | None = None) -> Tensor:
    """Return the distribution that the next id is drawn from: logits [..., V] -> probabilities [..., V] fp64.

    In this order: repetition penalty over the ids of `text` [..., S], temperature, the `top_k` likeliest,
    softmax, the smallest set of likeliest ids with mass >= `top_p`, those of at least `min_p` times the
    largest. Among equals the lowest id comes first. At temperature 0 all mass is on the first maximum.
    Equation: Holtzman et al. 2020 eq 2 (top-p); Nguyen et al. 2024 (min-p).
    """
    wide = logits.double()
    if sampling.repetition_penalty != 1 and text is not None:
        wide = penalised(wide, text, sampling.repetition_penalty)
    if sampling.temperature == 0:
        best = wide.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(wide).scatter_(-1, best, 1.0)
    ordered, ids = torch.sort(wide / sampling.temperature, dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[..., sampling.top_k :] = -torch.inf
    mass = torch.softmax(ordered, dim=-1)
    if sampling.top_p < 1:
        before = mass.cumsum(dim=-1) - mass
        # An id stays if those before it have not reached top_p; rounding must not add one that is not needed.
        mass = torch.where(before < sampling.top_p - 1e-12, mass, 0)
        mass = mass / mass.sum(dim=-1, keepdim=True)
    if sampling.min_p > 0:
        # Rounding must not lose an id that is exactly at the limit.
        mass = torch.where(mass >= mass[..., :1] * sampling.min_p * (1 - 1e-12), mass, 0)
        mass = mass / mass.sum(dim=-1, keepdim=True)
    return torch.zeros_like(mass).scatter_(-1, ids, mass)


def penalised(logits: Tensor, text: Tensor, penalty: float) -> Tensor:
    """Return logits [..., V] in which each id of `text` [..., S] is less likely, once however often it stands
    there: divided by `penalty` where it is positive, multiplied where it is negative.

    Equation: Keskar et al. 2019 section 4.1, which divides whatever the sign; a negative logit would rise by
    that, so the sign is looked at, as transformers does.
    """
    found = logits.gather(-1, text)
    return logits.scatter(-1, text, torch.where(found < 0, found * penalty, found / penalty))


def draw(probabilities: Tensor, uniforms: np.ndarray) -> list[int]:
    """Return one id per row of [B, V]: the first whose cumulative probability exceeds the row's number."""
    edges = probabilities.cumsum(dim=-1)
    edges = edges / edges[:, -1:]
    points = torch.from_numpy(uniforms).to(edges.device).unsqueeze(-1)
    drawn: list[int] = torch.searchsorted(edges, points, right=True).squeeze(-1).tolist()
    return drawn
