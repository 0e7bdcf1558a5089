"""Plain batch gradient descent of many small models as one program, each until it is good enough."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from gatewright.backbones import MixtureOutput
from gatewright.objectives import Loss

# Shown before each update: the epoch, which runs still go on [R'], and their weights [R', ...].
Watch = Callable[[int, Tensor, Mapping[str, Tensor]], None]
# How often runs that are done are taken out of the program.
_TIDY = 50


@dataclass(frozen=True)
class Descent:
    """R runs: `epochs` [R] int64, the updates up to the criterion (-1: not reached), and `weights` [R, ...]
    and the criterion's `squared_error` [R] at that point.
    """

    epochs: Tensor
    weights: Mapping[str, Tensor]
    squared_error: Tensor
    model: nn.Module

    def answer(self, x: Tensor) -> MixtureOutput:
        """Return every run's output for the cases x [T, D], each part with the runs in front."""
        with torch.no_grad():
            return vmap(lambda own: functional_call(self.model, own, (x,)))(dict(self.weights))


def descend(
    models: Sequence[nn.Module],
    objective: Callable[[MixtureOutput, Tensor], Loss],
    cases: tuple[Tensor, Tensor],
    rates: Sequence[float],
    *,
    limit: int,
    reached: float,
    watch: Watch | None = None,
    frozen: Collection[str] = (),
) -> Descent:
    """Return the runs of models that differ in their weights alone, with a step size each.

    Update: w <- w - rate * (gradient of the error summed over all cases). A run ends once the mean over
    cases of |d - blend|^2 is at most `reached`, or after `limit` updates. Weights named in `frozen` stay.
    """
    x, targets = cases
    model = copy.deepcopy(models[0]).requires_grad_(False)
    weights, _ = stack_module_state(list(models))
    final = {name: own.detach().clone() for name, own in weights.items()}
    epochs = torch.full((len(models),), -1)
    squared_error = torch.full((len(models),), torch.inf, dtype=x.dtype)
    live, step = torch.arange(len(models)), torch.tensor(rates, dtype=x.dtype)

    def error(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = functional_call(model, dict(own), (x,))
        return objective(output, targets).total, (targets - output.blend).square().sum(-1).mean()

    for epoch in range(limit + 1):
        if watch is not None:
            watch(epoch, live, weights)
        totals, squared = vmap(error)(weights)
        going = epochs[live] < 0
        done = going & ((squared.detach() <= reached) | (epoch == limit))
        if bool(done.any()):
            squared_error[live[done]] = squared.detach()[done]
            epochs[live[done]] = torch.where(squared.detach()[done] <= reached, epoch, -2)
            for name, own in weights.items():
                final[name][live[done]] = own.detach()[done]
            going = epochs[live] == -1
        if not bool(going.any()):
            break
        gradients = torch.autograd.grad(totals.sum(), list(weights.values()))
        with torch.no_grad():
            for (name, own), gradient in zip(weights.items(), gradients, strict=True):
                if name not in frozen:
                    own.sub_(step[live].view(-1, *(1,) * (own.dim() - 1)) * gradient)
        if epoch % _TIDY == 0 and not bool(going.all()):
            live = live[going]
            weights = {name: own.detach()[going].requires_grad_() for name, own in weights.items()}
    return Descent(epochs.clamp(min=-1), final, squared_error, model)
