"""Hold anybody's balance, z-, importance or load loss to its definition, up to a named convention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.testing.balance_cases import Batch, by_hand, masked, of_layers, random_batches, slow_value
from gatewright.testing.factors import CONVENTIONS, FACTORS, explained, factor_of
from gatewright.testing.report import TOLERANCE, Log, Mismatch, Report, near
from gatewright.testing.slow_losses import LOSSES, Setting

# fn(logits [T, E], experts [T, K], mask [T] or None, **options) -> 0-d loss
LossFunction = Callable[..., Tensor]


def check_balance(
    fn: LossFunction,
    loss: str = "balance",
    *,
    convention: str | None = None,
    scores: str = "softmax",
    padding: bool = True,
    chooses: bool = False,
    num_selected: int | None = None,
    over_layers: bool = False,
    dtype: torch.dtype = torch.float64,
    report: bool = False,
) -> Report:
    """Return the Report of holding a loss to its definition: values, gradients, and what must not change it.

    Args: `fn(logits [T, E], experts [T, K], mask [T] bool or None)` returns a 0-d tensor; `loss` is "balance"
    (Switch eq 4-6, for any K), "sequence_balance" and "gshard" (with `sequence_length=` S: tokens t S to
    (t + 1) S - 1 are a sequence), "z", "importance", "load", "device" (with `num_devices=`) or
    "communication" (and `devices_kept=`). The defining values are those of docs/conventions.md, 1 when
    balanced; `convention`, a name of CONVENTIONS, holds the function to another library's factor.
    `scores` "sigmoid" makes P of sigmoids that are normalised over experts (DeepSeek-V3). `padding` False
    leaves out masks, `chooses` True the cases whose experts are not the K highest logits (for a function that
    chooses by itself), `num_selected` those of another K. `over_layers` True passes [L, T, E] and [L, T, K]
    and adds cases of several layers, whose value is the mean over layers. `dtype`, of the logits, sets the
    tolerance. `report` True returns what differs instead of raising it; the diagnosis names the factor that
    all values are off by, and known mistakes.
    Raises: Mismatch unless `report`; UserError for unknown names.
    """
    factor = _checked(loss, convention, scores)
    tolerance, setting = TOLERANCE[dtype], Setting(scores=scores)
    batches = [*by_hand(loss), *random_batches(loss)]
    if scores == "sigmoid":
        batches = [batch for batch in batches if batch.value is None]
    batches += of_layers(loss) if over_layers and scores == "softmax" else ()
    batches = [batch for batch in batches if not (chooses and batch.chosen_anew)]
    if num_selected is not None:
        batches = [batch for batch in batches if batch.experts.shape[2] == num_selected]
        if not batches:
            raise UserError(f"num_selected {num_selected}; allowed: 1, 2 or 3, of which there are cases")
    if padding:
        batches += [masked(batch) for batch in batches if batch.value is None]
    log = Log(f"loss against {loss}" + (f" in the convention {convention!r}" if convention else ""), report)
    run = _Runner(fn, over_layers, dtype)
    found: list[tuple[Batch, float]] = []
    for batch in batches:
        name, own = f"{loss}, {batch.name}", _setting(batch, setting)
        log.run(name, partial(_value, run, loss, name, batch, own, factor, tolerance, found))
        if batch.value is None and loss != "load":
            log.run(name, partial(_gradient, run, loss, name, batch, own, factor, tolerance))
            for what, other in _unchanged(batch):
                log.run(name, partial(_same, run, name, what, batch, other, tolerance))
    for what, batch in _nothing(batches[-1], padding):
        log.run(f"{loss}, {what}", partial(_zero, run, f"{loss}, {what}", batch))
    complete = len(found) == len(batches)
    wrong = any("the value is" in difference.found for difference in log.differences)
    return log.finish(explained(loss, found, setting, tolerance) if wrong and complete else [])


def _checked(loss: str, convention: str | None, scores: str) -> Callable[[Batch], float]:
    """Return the convention's factor; raise UserError for names that are unknown."""
    if loss not in LOSSES:
        raise UserError(f"loss {loss!r} is unknown{did_you_mean(loss, LOSSES)}; allowed: {', '.join(LOSSES)}")
    if scores not in ("softmax", "sigmoid"):
        raise UserError(f"scores {scores!r} are unknown; allowed: softmax, sigmoid")
    if convention is None:
        return lambda batch: 1.0
    known = [name for name, losses in CONVENTIONS.items() if loss in losses]
    if convention not in known:
        raise UserError(
            f"convention {convention!r} of loss {loss!r} is unknown{did_you_mean(convention, known)}; "
            f"allowed: {', '.join(known) or 'none, it has one form'}"
        )
    return lambda batch: factor_of(FACTORS[CONVENTIONS[convention][loss]], batch)


def _setting(batch: Batch, setting: Setting) -> Setting:
    named = {name: batch.options[name] for name in ("num_devices", "devices_kept") if name in batch.options}
    return replace(setting, **named)


class _Runner:
    """Calls the function with a batch."""

    def __init__(self, fn: LossFunction, over_layers: bool, dtype: torch.dtype) -> None:
        self.fn, self.over_layers, self.dtype = fn, over_layers, dtype

    def __call__(self, name: str, batch: Batch, logits: Tensor | None = None) -> Tensor:
        """Return the loss; its shape checked."""
        values = (batch.logits if logits is None else logits).to(self.dtype)
        experts = batch.experts
        if not self.over_layers:
            values, experts = values[0], experts[0]
        found: Any = self.fn(values, experts, batch.mask, **batch.options)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise Mismatch(name, f"returned {tuple(getattr(found, 'shape', ()))} numbers", "a single number")
        return found.reshape(())


def _value(
    run: _Runner,
    loss: str,
    name: str,
    batch: Batch,
    setting: Setting,
    factor: Callable[[Batch], float],
    tolerance: float,
    found: list[tuple[Batch, float]],
) -> None:
    value = run(name, batch).item()
    found.append((batch, value))
    by_definition = slow_value(loss, batch, setting).item() if batch.value is None else batch.value
    expected = factor(batch) * by_definition
    if not near(value, expected, tolerance):
        raise Mismatch(name, f"the value is {value:.9g}", f"{expected:.9g}")


def _gradient(
    run: _Runner,
    loss: str,
    name: str,
    batch: Batch,
    setting: Setting,
    factor: Callable[[Batch], float],
    tolerance: float,
) -> None:
    """Compare the gradient of all logits: through the mean scores alone, none into padding."""
    leaf = batch.logits.clone().requires_grad_()
    value = run(name, batch, leaf)
    if not value.requires_grad:
        raise Mismatch(name, "the loss carries no gradient, so it teaches nothing")
    (found,) = torch.autograd.grad(value, leaf)
    exact = batch.logits.clone().requires_grad_()
    total = factor(batch) * slow_value(loss, batch, setting, exact) + 0 * exact.sum()
    (wanted,) = torch.autograd.grad(total, exact)
    worst = (found - wanted).abs().flatten().argmax()
    one, other = found.flatten()[worst].item(), wanted.flatten()[worst].item()
    if not near(one, other, 10 * tolerance):
        _, t, e = torch.unravel_index(worst, found.shape)
        where = f"gradient of token {int(t)}, logit {int(e)}"
        raise Mismatch(name, f"the {where} is {one:.9g}", f"{other:.9g}")


def _same(run: _Runner, name: str, what: str, batch: Batch, other: Batch, tolerance: float) -> None:
    before, after = run(name, batch).item(), run(name, other).item()
    if not near(after, before, tolerance):
        raise Mismatch(name, f"{what} changes the value to {after:.9g}", f"{before:.9g}, as before")


def _unchanged(batch: Batch) -> list[tuple[str, Batch]]:
    """Return batches that must have the same value, and what was done to them."""
    _, tokens, experts = batch.logits.shape
    size = experts // batch.options.get("num_devices", experts)
    order = torch.arange(experts).view(-1, size).flip(0).flatten()
    length = batch.options.get("sequence_length", tokens)
    turn = torch.arange(tokens).view(-1, length).flip(1).flatten()
    found = [
        (
            "another order of experts",
            replace(batch, logits=batch.logits[:, :, order], experts=order.argsort()[batch.experts]),
        )
    ]
    mask = None if batch.mask is None else batch.mask[turn]
    found.append(
        (
            "another order of tokens",
            replace(batch, logits=batch.logits[:, turn], experts=batch.experts[:, turn], mask=mask),
        )
    )
    if batch.mask is not None:
        kept = batch.mask.view(1, -1, 1)
        found.append(
            (
                "what stands in padding",
                replace(
                    batch,
                    logits=torch.where(kept, batch.logits, 9 - 4 * batch.logits),
                    experts=torch.where(kept, batch.experts, batch.experts.flip(1)),
                ),
            )
        )
    return found


def _nothing(batch: Batch, padding: bool) -> Sequence[tuple[str, Batch]]:
    """Return batches without a real token."""
    tokens = batch.logits.shape[1]
    none = replace(batch, logits=batch.logits[:, :0], experts=batch.experts[:, :0], mask=None)
    found = [("no tokens", none)]
    if padding:
        found.append(("padding alone", replace(batch, mask=torch.zeros(tokens, dtype=torch.bool))))
    return found


def _zero(run: _Runner, name: str, batch: Batch) -> None:
    value = run(name, batch).item()
    if value != 0:
        raise Mismatch(name, f"the value is {value:.9g}", "0")
