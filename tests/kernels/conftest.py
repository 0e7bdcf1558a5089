"""The ways of multiplying that every native operator is held to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["generated", "loops"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Multiply by torch's generated kernels, or by the loops that run where there are none."""
    told = torch.ops.gatewright.engine(request.param)
    if request.param not in told:
        pytest.skip(f"this machine multiplies by {told}")
    yield request.param
    torch.ops.gatewright.engine("generated")
