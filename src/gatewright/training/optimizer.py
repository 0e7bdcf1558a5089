"""AdamW with clipping and averaging in one pass, the experts that may rest, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.kernels.adamw import Lists, Rates, adamw_step, clip_scale, gradient_norm
from gatewright.parts import Experts
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.training.run import LoopSettings


class AveragedWeights:
    """Exponential moving average of a model's parameters: a += (1 - decay) (w - a), unbiased in its first
    steps.

    The decay of step n (1-based) is min(decay, n / (n + 10)), so that early averages are not held by the
    initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._live = list(model.parameters())
        self.values = [p.detach().clone() for p in self._live]
        self._of: dict[Tensor, Tensor] = dict(zip(self._live, self.values, strict=True))

    def __getitem__(self, parameter: Tensor) -> Tensor:
        return self._of[parameter]

    def next_step(self) -> float:
        """Count an update; return the share of the way that averages move."""
        self.updates += 1
        return 1 - min(self.decay, self.updates / (self.updates + 10))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights by one step."""
        self.move([*self._live], self.next_step())

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor], toward: float) -> None:
        """Move the averages of `parameters` by a share of the way."""
        if parameters:
            torch._foreach_lerp_([self._of[p] for p in parameters], [p.detach() for p in parameters], toward)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; call twice to evaluate in between."""
        for live, average in zip(self._live, self.values, strict=True):
            held = live.detach().clone()
            live.copy_(average)
            average.copy_(held)


class ClippedAdamW(torch.optim.AdamW):
    """torch's AdamW, same state and groups, that clips, steps and moves the averages in one pass.

    Args: `clip` is the largest norm of all gradients together (0: no clipping); `average` moves with each
    step; `slices` says of a parameter how many experts it stacks that may rest (`kernels.adamw.Lists`);
    `narrow` keeps a bf16 copy of every fp32 parameter in `narrowed`, written in the same pass.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        clip: float = 0.0,
        average: AveragedWeights | None = None,
        slices: Mapping[Tensor, int] | None = None,
        narrow: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(parameters, fused=True, **settings)
        self.clip, self.average, self.slices = clip, average, dict(slices or {})
        self.narrowed: dict[Tensor, Tensor] = {}
        if narrow:
            self.narrowed = {p: p.detach().bfloat16() for p in self._parameters() if p.dtype == torch.float32}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def total_norm(self) -> Tensor:
        """Return the norm of all gradients that are there, a 0-d tensor."""
        return gradient_norm([p.grad for p in self._parameters() if p.grad is not None])

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, norm: Tensor | float | None = None
    ) -> float | None:
        """Clip, step, and move the averages; return what `closure` returns. `norm` is `total_norm()` where
        it is known. Nothing is touched where it is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        known = float(self.total_norm() if norm is None else norm)
        if not math.isfinite(known):
            return loss
        toward = None if self.average is None else self.average.next_step()
        scale = clip_scale(known, self.clip)
        for group in self.param_groups:
            self._step_group(group, scale, toward)
        return loss

    def _step_group(self, group: dict[str, Any], scale: float, toward: float | None) -> None:
        own = [p for p in group["params"] if p.grad is not None]
        states = [self._state_of(p) for p in own]
        beta1, beta2 = group["betas"]
        lists = Lists(
            own,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            [self.slices.get(p, 0) for p in own],
            [] if self.average is None else [self.average[p] for p in own],
            [self.narrowed[p] for p in own] if all(p in self.narrowed for p in own) else [],
        )
        rates = Rates(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], toward or 0.0)
        adamw_step(lists, [p.grad for p in own], rates, scale)
        if self.average is not None and toward is not None and len(own) < len(group["params"]):
            self.average.move([p for p in group["params"] if p.grad is None], toward)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # The names, shapes and dtypes of torch's AdamW: either reads the other's checkpoints.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def build_adamw(
    model: nn.Module, run: LoopSettings, learning_rate: float, average: AveragedWeights | None = None
) -> ClippedAdamW:
    """Return AdamW over all parameters, with weight decay on all of them (OLMoE table 10)."""
    return ClippedAdamW(
        model.parameters(),
        clip=run.clip,
        average=average,
        slices=expert_slices(model) if run.idle_experts == "skip" else None,
        lr=learning_rate,
        betas=(run.beta1, run.beta2),
        eps=run.adam_eps,
        weight_decay=run.weight_decay,
    )


def expert_slices(model: nn.Module) -> dict[Tensor, int]:
    """Return, for every parameter that belongs to experts, how many it stacks; one that belongs to a single
    expert (a module of its own) counts 1. Routers, shared experts and dense layers are not in it.
    """
    found: dict[Tensor, int] = {}
    for module in model.modules():
        if isinstance(module, ModuleExperts):
            found |= dict.fromkeys(module.members.parameters(), 1)
    for module in model.modules():
        if isinstance(module, Experts):
            found |= dict.fromkeys(module.parameters(), module.num_experts)
    return found
