"""MoELayer as a user meets it: the flow worked by hand, shapes, padding, capacity, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from gatewright.errors import UserError
from gatewright.kernels import runnable_backends
from gatewright.parts import MLP, Experts, MoELayer
from tests.parts.harness import seen_layer

each_backend = pytest.mark.parametrize("backend", runnable_backends())
LN2, LN3 = math.log(2), math.log(3)


def scaling_layer(num_selected: int, backend: str, **options: object) -> MoELayer:
    """Return a layer of 3 experts for inputs >= 0 whose logits are x, and whose expert e gives (e + 1) x."""
    layer = MoELayer(3, 3, num_selected, 3, activation="relu", backend=backend, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
        layer.experts.w_in.copy_(torch.eye(3).expand(3, 3, 3))
        layer.experts.w_down.copy_(torch.stack([(e + 1) * torch.eye(3) for e in range(3)]))
        if layer.shared is not None:
            layer.shared.w_in.zero_()
            layer.shared.w_in[:3] = torch.eye(3)
            layer.shared.w_down.zero_()
            layer.shared.w_down[:, :3] = 10 * torch.eye(3)
    return layer


X = torch.tensor([[0.0, LN3, LN2]], dtype=torch.float64)  # softmax: 1/6, 1/2, 1/3


@each_backend
@pytest.mark.parametrize(
    ("num_selected", "form", "factor"),
    [
        (1, "raw", 1 / 2 * 2),  # Switch: p E_1(x)
        (2, "raw", 1 / 2 * 2 + 1 / 3 * 3),  # OLMoE
        (2, "renormalised", 3 / 5 * 2 + 2 / 5 * 3),  # Mixtral
        (2, "softmax_selected", 3 / 5 * 2 + 2 / 5 * 3),
        (3, "raw", 1 / 2 * 2 + 1 / 3 * 3 + 1 / 6 * 1),  # dense
    ],
)
def test_the_flow_by_hand(backend: str, num_selected: int, form: str, factor: float):
    y, _ = scaling_layer(num_selected, backend, weights=form)(X)
    assert y.tolist()[0] == pytest.approx((factor * X[0]).tolist(), abs=1e-14)


@each_backend
@pytest.mark.parametrize("num_shared", [1, 2])
def test_shared_experts_are_added_with_weight_one(backend: str, num_shared: int):
    layer = scaling_layer(1, backend, weights="raw", num_shared_experts=num_shared)
    assert layer.shared is not None
    assert layer.shared.w_in.shape == (3 * num_shared, 3)
    y, _ = layer(X)
    assert y.tolist()[0] == pytest.approx(((1 + 10) * X[0]).tolist(), abs=1e-14)


@each_backend
def test_a_dropped_choice_adds_zero_and_its_weight_is_not_handed_on(backend: str):
    # Two equal tokens choose experts 1 and 2; C = ceil(0.5 * 2 * 2 / 3) = 1: the second token gets nothing.
    y, _ = scaling_layer(2, backend, capacity_factor=0.5)(X.expand(2, 3))
    assert y[0].tolist() == pytest.approx((12 / 5 * X[0]).tolist(), abs=1e-14)
    assert y[1].tolist() == [0, 0, 0]
    # Token 1 shares only expert 1 with token 0: its own second choice keeps the weight 2/5.
    x = torch.stack([X[0], torch.tensor([LN2, LN3, 0.0], dtype=torch.float64)])
    y, _ = scaling_layer(2, backend, capacity_factor=0.5)(x)
    assert y[1].tolist() == pytest.approx((2 / 5 * 1 * x[1]).tolist(), abs=1e-14)


@each_backend
def test_leading_shapes(backend: str):
    torch.manual_seed(0)
    layer = MoELayer(6, 4, 2, 5, backend=backend, num_shared_experts=1)
    x = torch.randn(2, 3, 5, 6)
    y, stats = layer(x)
    assert y.shape == x.shape
    assert stats["router"].tokens == 30
    assert torch.equal(layer(x.reshape(30, 6))[0], y.reshape(30, 6))
    assert layer(x[0, 0, 0])[0].shape == (6,)
    assert layer(x[:, :0])[0].shape == (2, 0, 5, 6)


@each_backend
@pytest.mark.parametrize("factor", [None, 0.5, 1.0])
def test_padding_is_as_if_it_were_not_there(backend: str, factor: float | None):
    # NaN in the padding reaches neither values nor gradients; padding takes no place, and its output is 0.
    torch.manual_seed(0)
    layer = MoELayer(6, 4, 2, 5, backend=backend, num_shared_experts=1, capacity_factor=factor).double()
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    real = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    padded = torch.full((2, 4, 6), math.nan, dtype=torch.float64)
    padded[mask] = real.detach()
    padded.requires_grad_()

    y, _ = layer(real)
    expected = torch.autograd.grad(y.square().sum(), (real, *layer.parameters()))
    y_padded, stats = layer(padded, mask)
    found = torch.autograd.grad(y_padded.square().sum(), (padded, *layer.parameters()))
    assert torch.isfinite(y_padded).all()
    torch.testing.assert_close(y_padded[mask], y, rtol=1e-13, atol=1e-15)
    assert (y_padded[~mask] == 0).all()
    assert (found[0][~mask] == 0).all()
    torch.testing.assert_close(found[0][mask], expected[0], rtol=1e-12, atol=1e-14)
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert stats["router"].tokens == 5


def test_one_bad_token_stays_one_bad_token():
    torch.manual_seed(0)
    layer = MoELayer(6, 4, 2, 5)
    x = torch.randn(5, 6)
    bad = x.clone()
    bad[2, 1] = math.nan
    (y, _), (y_bad, stats) = layer(x), layer(bad)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(y[others], y_bad[others])
    assert torch.isnan(y_bad[2]).all()
    assert stats["router"].nonfinite == 1


@pytest.mark.parametrize(
    "mask",
    [torch.ones(3, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 3)],
    ids=["shape", "broadcast", "dtype"],
)
def test_a_mask_of_another_shape_or_type_is_refused(mask: torch.Tensor):
    with pytest.raises(
        UserError, match=r"mask torch\.\w+ .* for x \(2, 3, 6\); allowed: torch.bool \(2, 3\); give"
    ):
        MoELayer(6, 4, 2, 5)(torch.randn(2, 3, 6), mask)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_selected": 5}, "num_selected 5 with num_experts 4; allowed: 1 to 4; select at most"),
        ({"num_selected": 0}, "num_selected 0 with num_experts 4"),
        ({"num_experts": 0}, "num_experts 0; allowed: 1 or more"),
        ({"num_selected": 1}, "makes every gate exactly 1, so the router gets no gradient"),
        ({"num_selected": 1, "weights": "softmax_selected"}, "so the router gets no gradient"),
        ({"activation": "swigul"}, r"activation 'swigul' is unknown; did you mean 'swiglu'\?"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown; allowed: relu, gelu, swiglu, geglu"),
        ({"backend": "reference_"}, r"backend 'reference_' is unknown; did you mean 'reference'\?"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown; allowed: reference, grouped"),
        ({"capacity_factor": 0.0}, "capacity_factor 0.0; allowed: above 0"),
        ({"capacity_factor": -1.0}, "capacity_factor -1.0; allowed: above 0"),
        ({"width": 0}, "width 0, expert_width 5"),
        ({"expert_width": 0}, "expert_width 0, num_shared_experts 0; allowed: widths of 1 or more"),
        ({"num_shared_experts": -1}, "num_shared_experts -1"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changed: dict[str, object], reason: str):
    given: dict[str, object] = {"width": 6, "num_experts": 4, "num_selected": 2, "expert_width": 5}
    with pytest.raises(UserError, match=reason) as caught:
        MoELayer(**(given | changed))  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("activation", "names"),
    [("relu", {"w_up", "w_down"}), ("gelu", {"w_up", "w_down"})]
    + [(gated, {"w_gate_up", "w_down"}) for gated in ("swiglu", "geglu")],
)
def test_weights_are_stacked_under_their_names(activation: str, names: set[str]):
    experts = Experts(6, 4, 5, activation)
    assert {name for name, _ in experts.named_parameters()} == names
    assert experts.w_in.shape == (4, 10 if "w_gate_up" in names else 5, 6)
    assert experts.w_down.shape == (4, 6, 5)


def test_weights_start_truncated_at_two_standard_deviations():
    torch.manual_seed(0)
    for module, shape in ((MLP(64, 300), (600, 64)), (Experts(64, 5, 60), (5, 120, 64))):
        assert module.w_in.shape == shape
        assert module.w_in.abs().max() <= 2 / 8
        # A normal cut at 2 std keeps 0.880 of its standard deviation.
        assert module.w_in.std().item() == pytest.approx(0.880 / 8, rel=0.03)
    layer = MoELayer(64, 100, 2, 3)
    assert layer.router.weight.abs().max() <= 2 / 8
    layer.router.reset_parameters(std=1e-3)
    assert layer.router.weight.abs().max() <= 2e-3


def test_a_dense_layer_without_width_is_refused():
    with pytest.raises(UserError, match="width 6, ffn_width 0; allowed: 1 or more of each"):
        MLP(6, 0)


def test_equal_scores_choose_the_lowest_experts():
    layer = seen_layer(4, 2)
    _, stats = layer(torch.zeros(3, 4, dtype=torch.float64), capture=True)
    assert stats["router"].experts is not None
    assert stats["router"].experts.tolist() == [[0, 1]] * 3


@each_backend
def test_gradients_of_the_whole_layer_equal_finite_differences(backend: str):
    torch.manual_seed(1)
    layer = MoELayer(3, 4, 2, 2, backend=backend, num_shared_experts=1, capacity_factor=0.8).double()
    names = [name for name, _ in layer.named_parameters()]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, stats = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))
        record = stats["router"]
        return y, record.score_sums, record.logsumexp_sum, record.logsumexp_square_sum

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
