"""Native operators say what they take, and stay away where they are left out."""

from __future__ import annotations

import pytest
import torch

from gatewright.kernels import attend, choose_backend, cross_entropy, linears, native
from gatewright.parts import MLP, MoELayer

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


def test_gradients_of_gradients_are_refused_but_where_natives_are_left_out():
    torch.manual_seed(0)
    layer, dense = MoELayer(4, 3, 2, 5), MLP(4, 8)
    x = torch.randn(1100, 4, requires_grad=True)
    heads = x[:8].view(1, 2, 4, 4)
    targets = torch.zeros(1100, dtype=torch.int64)

    def losses() -> dict[str, torch.Tensor]:
        y, stats = layer(x)
        return {
            "attention": attend(heads, heads, heads).square().sum(),
            "experts": y.square().sum(),
            "router": stats["router"].score_sums.square().sum(),
            "linears": linears(x, [torch.eye(4)])[0].square().sum(),
            "mlp": dense(x).square().sum(),
            "cross_entropy": cross_entropy(x, targets),
        }

    for loss in losses().values():
        with pytest.raises(RuntimeError, match=r"once differentiable; .*left_out\(\)"):
            torch.autograd.grad(loss, x, create_graph=True)
    with native.left_out():
        for loss in (losses()[name] for name in ("mlp", "linears", "cross_entropy")):
            torch.autograd.grad(loss, x, create_graph=True)[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
