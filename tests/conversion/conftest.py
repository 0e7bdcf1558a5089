"""A run of ours, trained for a few steps, for all tests of conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatewright.training import train
from tests.training import runs


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Mixtral's run on bytes."""
    place = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEWRIGHT_CACHE", str(place / "cache"))
        train(runs.tiny_run(runs.write_text(place / "text"), place / "run", steps=4))
    return place / "run"
