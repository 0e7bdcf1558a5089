"""Random Mixture-of-Experts cases; one case through the library and through the oracle, as named tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from gatewright.kernels import ACTIVATIONS
from gatewright.parts import WEIGHT_FORMS, MoELayer, RouterStats, balance_loss, z_loss
from tests.oracle import moe as oracle

BALANCE, Z = 0.7, 0.3


def repeatable(examples: int) -> settings:
    """Return settings under which every run tries the same examples and writes nothing."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """One layer on one batch.

    `skew`: "none", "one" (all tokens choose expert E - 1 first) or "ties" (all scores equal).
    """

    num_tokens: int
    width: int
    num_experts: int
    num_selected: int
    expert_width: int
    activation: str = "swiglu"
    form: str = "raw"
    num_shared: int = 0
    capacity_factor: float | None = None
    mask: tuple[bool, ...] | None = None
    skew: str = "none"
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn, widths: st.SearchStrategy[int] | None = None) -> Case:
    """Draw a small case; widths and token counts are mostly not multiples of 4."""
    widths = st.integers(1, 9) if widths is None else widths
    num_tokens, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 7))
    num_selected = draw(st.integers(1, num_experts))
    forms = ("raw",) if num_selected == 1 < num_experts else WEIGHT_FORMS
    masks = st.none() | st.tuples(*[st.booleans()] * num_tokens)
    return Case(
        num_tokens,
        draw(widths),
        num_experts,
        num_selected,
        draw(widths),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from(forms)),
        draw(st.integers(0, 2)),
        draw(st.none() | st.sampled_from((0.01, 0.5, 0.9, 1.0, 1.25, 2.0))),
        draw(masks),
        draw(st.sampled_from(("none", "none", "one", "ties"))),
        draw(st.integers(0, 10_000)),
    )


def make(case: Case, backend: str, dtype: torch.dtype) -> tuple[MoELayer, Tensor, Tensor]:
    """Return (layer, x [T, D], direction [T, D]): the task loss is the sum of y * direction."""
    draw = torch.Generator().manual_seed(case.seed)
    layer = MoELayer(
        case.width,
        case.num_experts,
        case.num_selected,
        case.expert_width,
        activation=case.activation,
        weights=case.form,  # type: ignore[arg-type]
        num_shared_experts=case.num_shared,
        capacity_factor=case.capacity_factor,
        backend=backend,
    )
    x = torch.randn(case.num_tokens, case.width, generator=draw)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)
        if case.skew == "one":
            x[:, 0] = x[:, 0].abs() + 1
            layer.router.weight[:, 0] = -2.0
            layer.router.weight[-1, 0] = 20.0
        if case.skew == "ties":
            layer.router.weight.zero_()
    direction = torch.randn(x.shape, generator=draw)
    return layer.to(dtype), x.to(dtype), direction.to(dtype)


def through_library(case: Case, backend: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return y, the losses and all gradients by name, and the statistics as "stats.*"."""
    layer, x, direction = make(case, backend, dtype)
    x = x.requires_grad_()
    y, stats = layer(x, None if case.mask is None else torch.tensor(case.mask, dtype=torch.bool))
    balance, z = balance_loss(stats), z_loss(stats)
    ((y * direction).sum() + BALANCE * balance + Z * z).backward()
    found = {"y": y, "balance": balance, "z": z, "grad.x": x.grad, "grad.router": layer.router.weight.grad}
    found |= {"grad.w_in": layer.experts.w_in.grad, "grad.w_down": layer.experts.w_down.grad}
    if layer.shared is not None:
        found |= {"grad.shared_in": layer.shared.w_in.grad, "grad.shared_down": layer.shared.w_down.grad}
    record = stats["router"]
    for name in STATISTICS:
        found[f"stats.{name}"] = getattr(record, name)
    missing = [name for name, value in found.items() if value is None]
    assert not missing, f"no gradient: {missing}"
    return {name: value.detach() for name, value in found.items()}


STATISTICS = (
    *("tokens", "counts", "kept", "dropped_by_rank", "unrouted", "nonfinite"),
    *("score_sums", "logsumexp_sum", "logsumexp_square_sum"),
)


def through_oracle(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return what `through_library` returns, by the oracle in fp64 from the same (rounded) numbers."""
    layer, x, direction = make(case, "reference", dtype)
    x = x.double().requires_grad_()
    leaves = oracle_weights(layer)
    y, record = oracle.moe_layer(
        x,
        leaves,
        case.num_selected,
        form=case.form,
        activation=case.activation,
        capacity_factor=case.capacity_factor,
        mask=None if case.mask is None else list(case.mask),
    )
    balance, z = oracle.balance_loss([record]), oracle.z_loss([record])
    loss = (y * direction.double()).sum() + BALANCE * balance + Z * z
    named = {"x": x, "router": leaves.router, "w_in": leaves.w_in, "w_down": leaves.w_down}
    if leaves.shared_in is not None and leaves.shared_down is not None:
        named |= {"shared_in": leaves.shared_in, "shared_down": leaves.shared_down}
    # Every leaf takes part, so that an expert or a token that nothing reaches has the gradient 0.
    loss = loss + sum(0 * leaf.sum() for leaf in named.values())
    grads = torch.autograd.grad(loss, list(named.values()))
    found = {"y": y.detach(), "balance": balance.detach(), "z": z.detach()}
    found |= {f"grad.{name}": grad for name, grad in zip(named, grads, strict=True)}
    return found | {f"stats.{name}": value for name, value in record_tensors(record).items()}


def oracle_weights(layer: MoELayer) -> oracle.Weights:
    """Return a layer's weights as fp64 leaves with gradient."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().double().requires_grad_()

    shared = layer.shared
    return oracle.Weights(
        leaf(layer.router.weight),
        leaf(layer.experts.w_in),
        leaf(layer.experts.w_down),
        None if shared is None else leaf(shared.w_in),
        None if shared is None else leaf(shared.w_down),
    )


def record_tensors(record: oracle.Record) -> dict[str, Tensor]:
    """Return the oracle's record in the shapes and dtypes of RouterStats."""
    values = {name: getattr(record, name) for name in STATISTICS}
    for name in STATISTICS:
        if isinstance(values[name], int) or (
            isinstance(values[name], list) and isinstance(values[name][0], int)
        ):
            values[name] = torch.tensor(values[name], dtype=torch.int64)
    values["score_sums"] = torch.stack(record.score_sums).detach()
    values["logsumexp_sum"] = record.logsumexp_sum.detach()
    values["logsumexp_square_sum"] = record.logsumexp_square_sum.detach()
    return values


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Fail unless integers are equal and floats near; `tolerance` is relative to the tensor's largest."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        want = expected[name]
        assert value.shape == want.shape, f"{name}: shape {tuple(value.shape)} for {tuple(want.shape)}"
        if not want.is_floating_point():
            assert value.dtype == want.dtype, f"{name}: {value.dtype} for {want.dtype}"
            assert torch.equal(value, want), f"{name}: {value.tolist()} for {want.tolist()}"
            continue
        assert torch.isfinite(value).all(), f"{name} is not finite"
        if value.numel():
            error = (value.double() - want).abs().max().item()
            # The router's gradient cancels in a softmax, and what it is made of is of order 1.
            least = 0.1 if name == "grad.router" and tolerance > 1e-9 else 1e-2
            scale = max(want.abs().max().item(), least)
            assert error <= tolerance * scale, f"{name}: off by {error / scale:.3g} relative"


def statistics(record: RouterStats) -> dict[str, Tensor]:
    """Return a record's sums and counts by name."""
    return {name: getattr(record, name).detach() for name in STATISTICS}


def seen_layer(num_experts: int, num_selected: int, **options: object) -> MoELayer:
    """Return an fp64 layer whose logits are its input: width E and the identity as router."""
    layer = MoELayer(num_experts, num_experts, num_selected, 3, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(num_experts))
    return layer
