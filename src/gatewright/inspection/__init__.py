"""See what a router does: capture of its choices, metrics over them, and the report of a run or a race."""

from .capture import Captured, capture_routing, specialisation, token_view, token_views
from .metrics import (
    Repetition,
    Vocabulary,
    chance,
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
from .survey import Window, survey

__all__ = [
    "Captured",
    "Repetition",
    "Vocabulary",
    "Window",
    "capture_routing",
    "chance",
    "coactivation",
    "domain_specialisation",
    "load_entropy",
    "load_share",
    "load_variation",
    "max_over_mean",
    "render_page",
    "repetition",
    "router_saturation",
    "specialisation",
    "survey",
    "token_view",
    "token_views",
    "vocabulary_specialisation",
    "write_report",
]
