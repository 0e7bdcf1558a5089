"""Native operators say what they take, and stay away where they are left out."""

from __future__ import annotations

import pytest
import torch

from gatewright.kernels import choose_backend, native

pytestmark = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)


def test_left_out_natives_stay_away_and_come_back() -> None:
    x = torch.randn(4, 8)
    with native.left_out(), native.left_out():
        assert not native.is_ready()
        assert not native.runs_for(x)
        assert choose_backend(None, x)[0] == "grouped"
        assert "left out" in native.status().reason
    assert native.runs_for(x)
    assert native.runs_for(x.bfloat16(), x)
    assert not native.runs_for(x.double())
    assert not native.runs_for(x, x.to("meta"))
