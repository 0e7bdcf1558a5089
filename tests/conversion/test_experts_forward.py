"""The function that transformers calls: by hand, and what may come in beside the usual."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gatewright.conversion import experts as module
from gatewright.conversion import experts_forward, register_experts
from gatewright.errors import UserError
from gatewright.kernels import runnable_backends
from gatewright.kernels.linear import linear_by_group

hf = pytest.importorskip("tests.conversion.families", exc_type=ImportError)

MIXTRAL, GPT_OSS = ("mixtral", "MixtralExperts"), ("gpt_oss", "GptOssExperts")
each_backend = pytest.mark.parametrize("backend", [None, *runnable_backends()])
both = pytest.mark.parametrize("kind", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])


def ours(experts: nn.Module, *given: Tensor, backend: str | None = None) -> dict[str, Tensor]:
    """Return output and gradients of this toolkit's experts."""
    register_experts()
    experts.config._experts_implementation = "gatewright" if backend is None else f"gatewright_{backend}"
    found: dict[str, Tensor] = hf.results(experts, *given)
    experts.config._experts_implementation = "eager"
    return found


@each_backend
def test_gpt_oss_by_hand(backend: str | None):
    # One expert of two hidden numbers; x = 2. Columns in turn: gate 0.5 x + 0.1 = 1.1, up -x + 0.2 = -1.8,
    # gate 4 x + 0 = 8 (cut to 7), up 5 x + 0 = 10 (cut to 7). Hidden: (-1.8 + 1) 1.1 sigmoid(1.702 * 1.1) and
    # (7 + 1) 7 sigmoid(1.702 * 7); down 1 and 0.5, bias 3; the weight of the only choice is 0.25.
    experts = hf.experts_of(*GPT_OSS, num_local_experts=1, hidden_size=1, intermediate_size=2)
    for name, numbers in (
        ("gate_up_proj", [0.5, -1.0, 4.0, 5.0]),
        ("gate_up_proj_bias", [0.1, 0.2, 0.0, 0.0]),
        ("down_proj", [1.0, 0.5]),
        ("down_proj_bias", [3.0]),
    ):
        parameter = getattr(experts, name)
        parameter.data = torch.tensor(numbers).view_as(parameter)
    y = experts_forward(
        experts, torch.tensor([[2.0]]), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0.25]]), backend
    )
    one = (-1.8 + 1) * 1.1 / (1 + math.exp(-1.702 * 1.1))
    two = (7 + 1) * 7 / (1 + math.exp(-1.702 * 7))
    assert y.item() == pytest.approx(0.25 * (one + 0.5 * two + 3), rel=1e-6)


@both
@each_backend
def test_an_expert_that_is_not_here_adds_nothing(kind: tuple[str, str], backend: str | None):
    x, index, weights = hf.inputs()
    away = torch.zeros_like(index, dtype=torch.bool)
    away[0], away[3, 1], away[5, 0] = True, True, True
    expected = hf.results(hf.experts_of(*kind), x, index, torch.where(away, 0, weights))
    expected["weights"] = torch.where(away, 0, expected["weights"])
    for parallel, sentinel in ((False, hf.E), (True, hf.E), (True, hf.E + 7)):
        experts = hf.experts_of(*kind)
        experts._is_expert_parallel = parallel
        found = ours(experts, x, torch.where(away, sentinel, index), weights, backend=backend)
        error, name = hf.furthest(found, expected)
        assert error < 1e-5, name
        assert (found["weights"][away] == 0).all()
        assert (found["x"][0] == 0).all()


@both
def test_all_experts_may_be_elsewhere(kind: tuple[str, str]):
    experts = hf.experts_of(*kind)
    experts._is_expert_parallel = True
    x, index, weights = hf.inputs()
    for backend in (None, *runnable_backends()):
        found = ours(experts, x, torch.full_like(index, hf.E), weights, backend=backend)
        assert all((value == 0).all() for value in found.values())


@pytest.mark.parametrize(("number", "parallel"), [(-1, True), (-1, False), (hf.E + 1, False)])
def test_an_expert_that_is_nowhere_is_refused(number: int, parallel: bool):
    experts = hf.experts_of(*MIXTRAL)
    experts._is_expert_parallel = parallel
    x, index, weights = hf.inputs()
    index[2, 1] = number
    with pytest.raises(UserError, match="for 5 experts; allowed: 0 to 4, and 5 for none"):
        experts_forward(experts, x, index, weights)


@both
@each_backend
def test_no_tokens(kind: tuple[str, str], backend: str | None):
    x, index, weights = (t[:0].detach().requires_grad_(t.is_floating_point()) for t in hf.inputs())
    found = ours(hf.experts_of(*kind), x, index, weights, backend=backend)
    assert found["y"].shape == (0, hf.D)
    assert all((value == 0).all() for value in found.values())


@both
@each_backend
def test_a_token_may_name_an_expert_twice(kind: tuple[str, str], backend: str | None):
    # And all tokens the same one: more rows than tokens.
    x, index, weights = hf.inputs()
    for given in (index.clone().index_fill_(1, torch.tensor([0, 2]), 1), torch.full_like(index, 2)):
        expected = hf.results(hf.experts_of(*kind), x, given, weights)
        found = ours(hf.experts_of(*kind), x, given, weights, backend=backend)
        error, name = hf.furthest(found, expected)
        assert error < 1e-5, name


@both
@each_backend
def test_strides_and_the_kind_of_integer_do_not_matter(kind: tuple[str, str], backend: str | None):
    x, index, weights = hf.inputs()
    expected = hf.results(hf.experts_of(*kind), x, index, weights)
    turned = [t.detach().t().contiguous().t().requires_grad_(t.is_floating_point()) for t in (x, weights)]
    assert not turned[0].is_contiguous()
    given = (turned[0], index.t().contiguous().t().int(), turned[1])
    error, name = hf.furthest(ours(hf.experts_of(*kind), *given, backend=backend), expected)
    assert error < 1e-5, name


@each_backend
def test_nothing_is_kept_without_gradients(backend: str | None):
    experts = hf.experts_of(*MIXTRAL)
    with torch.no_grad():
        y = experts_forward(experts, *hf.inputs(), backend)
    assert not y.requires_grad
    torch.testing.assert_close(y, experts(*hf.inputs()).detach(), rtol=1e-5, atol=1e-4)


@both
@each_backend
@pytest.mark.parametrize(
    ("of_x", "of_weights", "of_experts"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_dtypes_may_differ(
    kind: tuple[str, str], backend: str | None, of_x: Any, of_weights: Any, of_experts: Any
):
    x, index, weights = hf.inputs(torch.bfloat16)
    exact = hf.experts_of(*kind, torch.bfloat16).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, weights)]
    expected = hf.results(exact, leaves[0], index, leaves[1])
    given = (x.detach().to(of_x).requires_grad_(), index, weights.detach().to(of_weights).requires_grad_())
    experts = hf.experts_of(*kind, torch.bfloat16).to(of_experts)
    found = ours(experts, *given, backend=backend)
    assert found["y"].dtype == of_x
    assert (found["x"].dtype, found["weights"].dtype) == (of_x, of_weights)
    assert found["down_proj"].dtype == of_experts
    rounds = torch.bfloat16 in (of_x, of_experts, of_weights)
    error, name = hf.furthest(found, expected)
    assert error < (4e-2 if rounds else 1e-12), name


@both
@each_backend
def test_autocast_computes_in_its_dtype_and_returns_the_input_s(kind: tuple[str, str], backend: str | None):
    given = hf.inputs()
    expected = hf.results(hf.experts_of(*kind), *given)
    experts = hf.experts_of(*kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(experts, *given, backend=backend)
    assert {value.dtype for value in found.values()} == {torch.float32}
    error, _ = hf.furthest(found, expected)
    assert 1e-4 < error < 4e-2


@both
def test_gradients_reach_what_makes_the_weights(kind: tuple[str, str]):
    class Plus(nn.Module):
        """A weight plus one learnt number, as adapters add to it."""

        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Parameter(torch.tensor(0.1))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.more

    results = []
    for run in (hf.results, ours):
        experts = hf.experts_of(*kind)
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(experts, name, Plus())
        results.append(run(experts, *hf.inputs()))
    assert any(name.endswith("0.more") for name in results[0])
    assert hf.furthest(results[1], results[0])[0] < 1e-5


@both
def test_a_weight_is_asked_for_once(kind: tuple[str, str]):
    asked = []

    class Seen(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            asked.append(1)
            return weight

    experts = hf.experts_of(*kind)
    parametrize.register_parametrization(experts, "down_proj", Seen())
    asked.clear()
    experts_forward(experts, *hf.inputs())
    assert len(asked) == 1


class _Dirty(torch.autograd.Function):
    """Rows through, with NaN behind the last expert's in both directions: memory that nobody wrote."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, end: int) -> Tensor:
        ctx.end = end
        return torch.cat([rows[:end], torch.full_like(rows[end:], torch.nan)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat([grad[: ctx.end], torch.full_like(grad[ctx.end :], torch.nan)]), None


@pytest.mark.parametrize("kind", [GPT_OSS, ("muse_spark", "MuseSparkExperts")], ids=["gpt_oss", "muse_spark"])
def test_rows_of_no_expert_reach_nothing_where_shapes_are_static(
    monkeypatch: pytest.MonkeyPatch, kind: tuple[str, str]
):
    def dirty(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        end = int(counts.sum())
        assert end < rows.shape[0]
        return _Dirty.apply(linear_by_group(_Dirty.apply(rows, end), weights, counts), end)

    x, index, weights = hf.inputs()
    away = torch.zeros_like(index, dtype=torch.bool)
    away[0], away[3, 1] = True, True
    expected = hf.results(hf.experts_of(*kind), x, index, torch.where(away, 0, weights))
    expected["weights"] = torch.where(away, 0, expected["weights"])
    monkeypatch.setattr(module, "linear_by_group", dirty)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    error, name = hf.furthest(
        ours(hf.experts_of(*kind), x, torch.where(away, hf.E, index), weights), expected
    )
    assert error < 1e-5, name
