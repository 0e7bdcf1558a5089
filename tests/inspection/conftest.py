"""Fixtures that spare the drawing where a test is about something else."""

from __future__ import annotations

import pytest

from gatewright.inspection.plots import atlas, bars, curves, heat, summary, theme


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing where a test is about words."""
    stub = theme.Image("x", "alt", "caption", b"\x89PNG" + bytes(30), b"\x89PNG" + bytes(30))
    for module in (atlas, bars, curves, heat, summary):
        monkeypatch.setattr(module, "render", lambda *_, **__: stub)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw small pictures in one theme where a test is about what is drawn, not how it looks."""
    monkeypatch.setattr(theme, "DOTS", 40)
    monkeypatch.setattr(theme, "THEMES", (theme.LIGHT,))
