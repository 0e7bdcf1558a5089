"""Norms, linear maps, the plain feed-forward layer and cross-entropy in C++: the numbers of their plain
definitions in fp64, the same bits for every number of threads and when recomputed, and clear refusals.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gatewright.backbones import Decoder
from gatewright.kernels import ACTIVATIONS, add_norm, cross_entropy, dense_mlp, linears, native, rms_norm
from gatewright.objectives import NextToken
from gatewright.parts import MLP

pytestmark = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
OPERATORS = ("norm", "maps", "mlp", "cross_entropy")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the native operators for few tokens and in bf16 for all widths, too."""
    for module, names in (
        ("linears", {"_LEAST_TOKENS": 0, "_WIDEST_NARROW": 2**20}),
        ("dense", {"_LEAST_TOKENS": 0}),
    ):
        for name, value in names.items():
            monkeypatch.setattr(importlib.import_module(f"gatewright.kernels.{module}"), name, value)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Case:
    """A function of tensors, and the tensors, the first `tokens` of which are activations."""

    def __init__(self, run: Callable[..., Any], *leaves: Tensor, tokens: int = 1) -> None:
        self.run, self.leaves, self.tokens = run, leaves, tokens

    def in_dtype(self, dtype: torch.dtype, wide: bool) -> list[Tensor]:
        """Return the tensors in `dtype`; with `wide`, weights stay in fp32."""
        return [one if wide and i >= self.tokens else one.to(dtype) for i, one in enumerate(self.leaves)]

    def everything(self, leaves: list[Tensor]) -> list[Tensor]:
        """Return all outputs, and all gradients along a fixed direction."""
        mine = [one.detach().clone().requires_grad_() for one in leaves]
        found = self.run(*mine)
        outs = [found] if isinstance(found, Tensor) else list(found)
        along = [drawn(*out.shape, seed=7).to(out.dtype) for out in outs]
        return [out.detach() for out in outs] + list(torch.autograd.grad(outs, mine, along))


def case_of(name: str, tokens: int, width: int) -> Case:
    """Return the case `name` at these sizes."""
    x, scale = drawn(tokens, width), 1 + 0.1 * drawn(width)
    if name == "norm":
        return Case(lambda x, w: rms_norm(x, w, 1e-5), x, scale)
    if name == "add_norm":
        return Case(lambda x, y, w: add_norm(x, y, w, 1e-5), x, drawn(tokens, width, seed=1), scale, tokens=2)
    if name == "maps":
        weights = [drawn(n, width, seed=n) / width**0.5 for n in (width, 5, 2 * width + 1)]
        return Case(lambda x, *w: linears(x, w), x, *weights)
    if name == "loss":
        targets = torch.arange(tokens) * 7 % width
        return Case(lambda logits: cross_entropy(logits, targets), 3 * x)
    activation, biased = name.split("+")[0], name.endswith("+bias")
    hidden = width + 3
    rows = hidden * (2 if "glu" in activation else 1)
    weights = [drawn(rows, width) / width**0.5, drawn(width, hidden) / hidden**0.5]
    biases = [drawn(rows), drawn(width)] if biased else []
    return Case(lambda x, a, b, *c: dense_mlp(x, a, b, activation, *c), x, *weights, *biases)


NAMES = ["norm", "add_norm", "maps", "loss", "swiglu", "swiglu+bias"]
SIZES = [(1, 1), (3, 17), (130, 33), (300, 64), (1100, 40)]


def check_near(found: list[Tensor], expected: list[Tensor], least: float) -> None:
    """Require that each is as near as rounding by `least` allows, by the largest number of each."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        most = max(other.abs().max().item(), 1e-3) if other.numel() else 1.0
        if one.numel():
            assert (one.double() - other).abs().max() <= least * most


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition_in_fp64(engine: str, name: str, tokens: int, width: int):
    case = case_of(name, tokens, width)
    expected = case.everything([one.double() for one in case.leaves])
    check_near(case.everything(list(case.leaves)), expected, 1e-5)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_stays_within_its_rounding(engine: str, name: str, wide: bool):
    for tokens, width in ((130, 33), (300, 64)):
        case = case_of(name, tokens, width)
        leaves = case.in_dtype(torch.bfloat16, wide)
        expected = case.everything([one.double() for one in leaves])
        found = case.everything(leaves)
        check_near(found, expected, 2e-2)
        kinds = [one.dtype for one in found[-len(leaves) :]]
        assert kinds == [one.dtype for one in leaves]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str):
    case = case_of(activation, 40, 12)
    expected = case.everything([one.double() for one in case.leaves])
    check_near(case.everything(list(case.leaves)), expected, 2e-5)


@pytest.mark.parametrize("name", NAMES[:3] + NAMES[4:])
def test_no_tokens(name: str):
    case = case_of(name, 0, 8)
    found = case.everything(list(case.leaves))
    expected = case.everything([one.double() for one in case.leaves])
    check_near(found, expected, 0.0)
    assert all(not gradient.any() for gradient in found[-len(case.leaves) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_bit(name: str, dtype: torch.dtype):
    case = case_of(name, 1100, 40)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(case.everything(case.in_dtype(dtype, True)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, found[0], strict=True))


def test_autocast_decides_what_is_multiplied_in():
    # fp32 tokens are narrowed on the way in, fp32 weights too; their gradients stay in fp32.
    for name in ("maps", "swiglu"):
        case = case_of(name, 130, 32)
        with torch.autocast("cpu", torch.bfloat16):
            found = case.everything(list(case.leaves))
            with native.left_out():
                plain = case.everything(list(case.leaves))
        outputs = len(found) - len(case.leaves)
        assert [one.dtype for one in found] == [one.dtype for one in plain]
        assert all(one.dtype == torch.bfloat16 for one in found[:outputs])
        check_near(found, [one.double() for one in plain], 2e-2)


def test_a_sum_of_two_dtypes_takes_the_wider():
    x, y, weight = drawn(70, 24), drawn(70, 24, seed=1), torch.ones(24)
    total, normed = add_norm(x, y.bfloat16(), weight, 1e-5)
    assert torch.equal(total, x + y.bfloat16())
    assert normed.dtype == torch.float32
    wide, _ = add_norm(x.bfloat16(), y, weight, 1e-5)
    assert torch.equal(wide, x.bfloat16() + y)


@pytest.mark.parametrize("used", [0, 1])
def test_a_part_of_the_outputs_may_be_used(used: int):
    for name in ("add_norm", "maps"):
        case = case_of(name, 70, 24)
        found, expected = [], []
        for leaves, into in ((case.leaves, found), ([one.double() for one in case.leaves], expected)):
            mine = [one.clone().requires_grad_() for one in leaves]
            case.run(*mine)[used].square().sum().backward()
            into.extend(torch.zeros(0) if one.grad is None else one.grad for one in mine)
        there = [i for i, one in enumerate(expected) if one.numel()]
        assert all(not found[i].any() for i in range(len(found)) if i not in there)
        check_near([found[i] for i in there], [expected[i] for i in there], 1e-5)


def test_frozen_weights_get_no_gradient_and_tokens_theirs():
    for name in ("maps", "swiglu", "norm"):
        case = case_of(name, 70, 24)
        x = case.leaves[0].clone().requires_grad_()
        out = case.run(x, *case.leaves[1:])
        (out if isinstance(out, Tensor) else out[0]).sum().backward()
        assert x.grad is not None
        assert all(weight.grad is None for weight in case.leaves[1:])


class Seen(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def trained(model: Decoder, tokens: Tensor, recompute: bool = False) -> list[Tensor]:
    """Return the loss and all gradients."""
    model.zero_grad()
    if recompute:
        blocks = [layer.forward for layer in model.layers]
        for layer, forward in zip(model.layers, blocks, strict=True):
            layer.forward = lambda *given, inner=forward: checkpoint(inner, *given, use_reentrant=False)
    loss = NextToken()(model(tokens[:, :-1]), tokens[:, 1:]).total
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_a_decoder(precision: str):
    torch.manual_seed(0)
    model = Decoder(97, 32, 4, [MLP(32, 40), MLP(32, 41)], qk_norm="head")
    tokens = torch.randint(0, 97, (4, 65))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with Seen() as seen:
            found = trained(model, tokens)
        with native.left_out(), Seen() as plain:
            expected = trained(model, tokens)
        again = trained(model, tokens, recompute=True)
    assert {f"gatewright::{name}_{way}ward" for name in OPERATORS for way in ("for", "back")} <= seen.names
    assert not any(name.startswith("gatewright") for name in plain.names)
    check_near(found, [one.double() for one in expected], 1e-5 if precision == "fp32" else 5e-2)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


def test_logits_that_are_not_finite_and_targets_that_are_no_column():
    rows = drawn(40, 19)
    targets = torch.arange(40) % 19
    rows[3, 5] = -torch.inf  # no answer there: a loss all the same
    with native.left_out():
        expected = cross_entropy(rows, targets)
    torch.testing.assert_close(cross_entropy(rows, targets), expected)
    for value in (torch.nan, torch.inf):
        rows[7, 2] = value
        assert cross_entropy(rows, targets).isnan()
    for wrong in (19, -1, -100):
        targets[39] = wrong
        with pytest.raises(IndexError, match=f"target {wrong}; allowed: 0 to 18"):
            cross_entropy(drawn(40, 19), targets)


def test_operators_describe_themselves():
    ops, x, weight = torch.ops.gatewright, drawn(40, 8), drawn(6, 8)
    targets, w_in = torch.arange(40) % 8, drawn(10, 8)
    normed = ops.norm_forward(x, x, weight[0], 1e-5)
    pre = ops.mlp_forward(x, w_in, drawn(8, 5), None, None, "swiglu", True)[1]
    sums = ops.cross_entropy_forward(x, targets)[1]
    for operator, given in (
        (ops.norm_forward, (x, None, weight[0], 1e-5)),
        (ops.norm_forward, (x, x.bfloat16(), weight[0], 1e-5)),
        (ops.norm_backward, (x, x, normed[0], normed[2], weight[0])),
        (ops.maps_forward, (x, [weight, w_in], True)),
        (ops.maps_backward, ([drawn(40, 6)], x, [weight], False, False, True)),
        (ops.mlp_forward, (x, w_in, drawn(8, 5), None, None, "swiglu", True)),
        (ops.mlp_backward, (x, pre, True, True, x, w_in, drawn(8, 5), None, None, "swiglu")),
        (ops.cross_entropy_forward, (x, targets)),
        (ops.cross_entropy_backward, (torch.ones(()), x, targets, sums)),
    ):
        torch.library.opcheck(operator.default, given, test_utils=("test_schema", "test_faketensor"))
