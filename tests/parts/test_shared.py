"""Gated shared experts: by hand, against the oracle, in a layer."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.kernels import ACTIVATIONS
from gatewright.parts import MoELayer
from gatewright.parts.shared import GatedShared
from tests.kernels.plans import gradients
from tests.kernels.test_variants import near
from tests.oracle.experts import biased_feed_forward, gated
from tests.parts.harness import repeatable
from tests.parts.test_experts import filled


def test_by_hand():
    # x = (ln 3, 1), gate (1, 0): sigmoid(ln 3) = 3 / 4. FFN: relu(0 * ln 3 + 2 * 1) = 2, down (1, 4): (2, 8).
    # y = 3 / 4 * (2, 8) = (1.5, 6).
    shared = GatedShared(2, 1, "relu")
    with torch.no_grad():
        shared.gate.copy_(torch.tensor([[1.0, 0.0]]))
        shared.mlp.w_in.copy_(torch.tensor([[0.0, 2.0]]))
        shared.mlp.w_down.copy_(torch.tensor([[1.0], [4.0]]))
    y = shared(torch.tensor([[math.log(3), 1.0]]))
    torch.testing.assert_close(y, torch.tensor([[1.5, 6.0]]))


@given(
    num_tokens=st.integers(0, 4),
    width=st.integers(1, 5),
    hidden=st.integers(1, 5),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    seed=st.integers(0, 10_000),
)
@repeatable(200)
def test_output_and_gradients_equal_the_oracle(
    num_tokens: int, width: int, hidden: int, activation: str, bias: bool, seed: int
):
    shared = filled(GatedShared(width, hidden, activation, bias=bias), seed)
    mlp = shared.mlp
    x = torch.randn(num_tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    out = [biased_feed_forward(row, mlp.w_in, mlp.w_down, activation, mlp.b_in, mlp.b_down) for row in x]
    expected = gated(x, shared.gate[0], torch.stack(out)) if out else x * 1
    y = shared(x)
    near(y, expected, 1e-12)
    leaves = [x, *shared.parameters()]
    found, wanted = gradients(y.square().sum(), leaves), gradients(expected.square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        near(one, other, 1e-12)


def test_in_a_layer_it_stands_beside_the_routed_experts():
    shared = filled(GatedShared(4, 6))
    layer = MoELayer(4, 3, 2, 5, shared=shared).double()
    plain = MoELayer(4, 3, 2, 5).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if not n.startswith("shared")})
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], plain(x)[0] + shared(x))
