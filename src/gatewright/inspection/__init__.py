"""See what a router does: capture of its choices, metrics over them, and the report of a run or a race."""

from .metrics import (
    Repetition,
    Vocabulary,
    coactivation,
    domain_specialisation,
    load_entropy,
    load_share,
    load_variation,
    max_over_mean,
    repetition,
    router_saturation,
    vocabulary_specialisation,
)
from .report import render_page, write_report

__all__ = [
    "Repetition",
    "Vocabulary",
    "coactivation",
    "domain_specialisation",
    "load_entropy",
    "load_share",
    "load_variation",
    "max_over_mean",
    "render_page",
    "repetition",
    "router_saturation",
    "vocabulary_specialisation",
    "write_report",
]
