"""Balance on an adopted checkpoint: a loss of this toolkit, or selection biases that learn from loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatewright.conversion.biases import Bias, biases_of
from gatewright.conversion.recorder import RouterRecorder
from gatewright.errors import UserError, did_you_mean
from gatewright.parts.balancing import SCOPES
from gatewright.parts.losses import LOSSES
from gatewright.parts.running import RunningCounts
from gatewright.parts.stats import Stats

# Those of LOSSES that need nothing but what every router of transformers says.
ADOPTED_LOSSES = ("balance", "sequence_balance", "gshard", "z")
AllReduce = Callable[[Tensor], Tensor]
IGNORED = -100  # the label of a token that is not predicted, in all of transformers


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Return counts summed over the default process group; as they are where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.clone()
        torch.distributed.all_reduce(counts)
    return counts


class Attached:
    """What hangs on a model: it sees each training pass, and `step` ends an optimizer step."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, gradients: bool) -> None:
        self.recorder = RouterRecorder(model, gradients=gradients)
        self._handles: list[Any] = [model.register_forward_hook(self._after, with_kwargs=True)]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.step()))

    @property
    def stats(self) -> Stats:
        """What the last forward pass chose."""
        return self.recorder.stats

    def step(self) -> None:
        """End an optimizer step; called by hand, by `optimizer`, or by `trainer_callback`."""

    def detach(self) -> None:
        """Take it off the model."""
        self.recorder.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        # Evaluation and sampling are not what is trained: they neither count nor cost.
        counts = model.training and torch.is_grad_enabled()
        return self._trained(model, kwargs, output) if counts else None

    def _trained(self, model: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        """See one training pass; return another output, or None to leave it."""


class AttachedBalance(Attached):
    """A balance loss on a model of transformers; see `attach_balance`. `value` is that of the last training
    pass, without its weight.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Stats], Tensor],
        weight: float,
        running: RunningCounts | None,
        optimizer: Optimizer | None,
    ) -> None:
        super().__init__(model, optimizer, gradients=True)
        self.weight = weight
        self.value: Tensor | None = None
        self._loss, self._running = loss, running
        self._waiting: Tensor | None = None

    def loss(self) -> Tensor:
        """Return weight * loss of the last training pass, for a sum that you make yourself: where the model
        was given no labels. Raises: UserError where there is none, or the model's own loss holds it already.
        """
        if self._waiting is None:
            raise UserError(
                "no balance loss waits to be added: the model has not run in training since, or its own loss "
                "holds it, as labels were given; allowed: once after each training pass without labels"
            )
        found, self._waiting = self._waiting, None
        return found

    def step(self) -> None:
        """Forget the counts of this optimizer step; of use with the scope "global_batch" alone."""
        if self._running is not None:
            self._running.reset()

    def _trained(self, model: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        stats = self.stats
        _refuse_second_loss(model, kwargs.get("output_router_logits"))
        _refuse_lost_gradients(stats, self.recorder)
        if self._waiting is not None:
            raise UserError(
                "the balance loss of the pass before was never added, so nothing trains the routers; "
                "allowed: labels given to the model, or handle.loss() added to your sum after each pass"
            )
        value = self._loss(stats)
        self.value = value.detach()
        if kwargs.get("labels") is None:
            self._waiting = self.weight * value
            return None
        return _with_loss(output, self.weight * value * _share(kwargs, value))


class AttachedBias(Attached):
    """Selection biases that learn from loads; see `attach_bias`. `biases`: by the name of the layer."""

    def __init__(
        self,
        model: nn.Module,
        biases: Mapping[str, Bias],
        all_reduce: AllReduce | None,
        optimizer: Optimizer | None,
    ) -> None:
        super().__init__(model, optimizer, gradients=False)
        self.biases = dict(biases)
        self._all_reduce = all_reduce
        self._running = RunningCounts()

    @property
    def counts(self) -> Mapping[str, Tensor]:
        """What this rank has counted since the last step, by the name of the layer."""
        return self._running.counts

    @torch.no_grad()
    def step(self) -> None:
        """Move every bias once against the loads since the last step, summed over ranks; none without one.

        Every rank calls it equally often.
        """
        counts = self._running.counts
        if not counts:
            return
        names = sorted(counts)
        whole = torch.cat([counts[name] for name in names])
        if self._all_reduce is not None:
            whole = self._all_reduce(whole)
        for name, counted in zip(names, whole.split([len(counts[name]) for name in names]), strict=True):
            self.biases[name].update(counted)
        self._running.reset()

    def _trained(self, model: nn.Module, kwargs: dict[str, Any], output: Any) -> None:
        self._running.add(Stats({name: self.stats[name] for name in self.biases if name in self.stats}))


def attach_balance(
    model: nn.Module,
    loss: str | Callable[[Stats], Tensor] = "balance",
    weight: float = 0.01,
    *,
    scope: str = "micro_batch",
    all_reduce: AllReduce | None = sum_over_ranks,
    optimizer: Optimizer | None = None,
) -> AttachedBalance:
    """Let a balance loss of this toolkit train the routers of a transformers model, and return its handle.

    Where the model is given labels, its loss becomes task + weight * loss in each training pass (never in
    evaluation); else `handle.loss()` is what you add. With `num_items_in_batch`, as transformers' Trainer
    hands it over, the loss takes the share of the batch's labels that the pass holds, as the task loss does:
    so it weighs the same for every number of micro-batches and ranks.
    Args: `loss` a name of ADOPTED_LOSSES, or a function of Stats; `scope` of "balance" (`balance_loss`);
    `all_reduce` sums int64 counts over ranks for "global_batch", whose counts `step` ends.
    Raises: UserError for an unknown loss or scope, and for a model whose own settings add a loss.
    """
    _refuse_second_loss(model, None)
    running = None
    if callable(loss):
        function = loss
    elif loss not in ADOPTED_LOSSES:
        raise UserError(
            f"loss {loss!r} is unknown here{did_you_mean(loss, ADOPTED_LOSSES)}; allowed: "
            f"{', '.join(ADOPTED_LOSSES)}, or a function of Stats"
        )
    elif scope == "micro_batch":
        function = LOSSES[loss]
    elif loss != "balance" or scope not in SCOPES:
        raise UserError(
            f"scope {scope!r} with loss {loss!r}; allowed: 'micro_batch', and with 'balance' also "
            f"{', '.join(SCOPES[1:])}"
        )
    elif scope == "sequence":
        function = LOSSES["sequence_balance"]
    else:
        running = RunningCounts(all_reduce)
        function = running.loss
    return AttachedBalance(model, function, weight, running, optimizer)


def attach_bias(
    model: nn.Module,
    rate: float = 1e-3,
    rule: str = "sign",
    *,
    normalised: bool = False,
    stop_after: int | None = None,
    all_reduce: AllReduce | None = sum_over_ranks,
    optimizer: Optimizer | None = None,
) -> AttachedBias:
    """Let the selection biases of a transformers model learn from loads, and return their handle.

    transformers holds them (`e_score_correction_bias`, `expert_bias`) and moves none. Each training pass is
    counted, without padding and without what is computed again in the backward pass; `handle.step()` after
    the optimizer's step moves each bias once (`SelectionBias` has the equation). The new biases stand in the
    model's own tensors, so its checkpoints hold them.
    Args: `rate`, `rule`, `normalised`, `stop_after` as `SelectionBias` takes them; `all_reduce` sums int64
    counts over ranks, once per step.
    Raises: UserError for a model without such a bias.
    """
    biases = biases_of(model, rate, rule, normalised=normalised, stop_after=stop_after)
    return AttachedBias(model, biases, all_reduce, optimizer)


def trainer_callback(*attached: Attached) -> Any:
    """Return a TrainerCallback that ends a step of each handle after each step of the Trainer's optimizer."""
    from transformers import TrainerCallback

    class StepEnds(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for one in attached:
                one.step()

    return StepEnds()


def _refuse_second_loss(model: nn.Module, asked: bool | None) -> None:
    """Raise UserError for a model that adds a balance loss too; `asked` is the flag of one call."""
    config = getattr(model, "config", None)
    inner = getattr(config, "text_config", None) or config
    own = float(getattr(inner, "router_aux_loss_coef", 0.0) or 0.0)
    if own and (getattr(inner, "output_router_logits", False) if asked is None else asked):
        raise UserError(
            f"{type(model).__name__} adds a balance loss of its own (output_router_logits with "
            f"router_aux_loss_coef {own}); allowed: one of the two; without output_router_logits it adds none"
        )


def _refuse_lost_gradients(stats: Stats, recorder: RouterRecorder) -> None:
    """Raise UserError where a router that is trained was recorded without its graph."""
    for site in recorder.sites:
        trained = any(parameter.requires_grad for parameter in site.router.parameters())
        if trained and site.name in stats and not stats[site.name].score_sums.requires_grad:
            raise UserError(
                f"the router of {site.name} ran without gradients, so no loss can reach it; allowed: "
                "checkpointing with use_reentrant=False, which is transformers' default"
            )


def _share(kwargs: dict[str, Any], like: Tensor) -> Tensor | float:
    """Return the part of a step's labels that one pass holds; 1 where the pass is a mean of its own."""
    whole = kwargs.get("num_items_in_batch")
    if whole is None:
        return 1.0
    shifted = kwargs.get("shift_labels")
    labels = kwargs["labels"][..., 1:] if shifted is None else shifted
    own = labels.ne(IGNORED).sum().to(like)
    return own / (whole.to(like.device).reshape(-1)[0] if isinstance(whole, Tensor) else whole)


def _with_loss(output: Any, more: Tensor) -> Any:
    """Return a model's output with its loss raised by `more`."""
    if isinstance(output, tuple):
        return (output[0] + more, *output[1:])
    if getattr(output, "loss", None) is None:
        raise UserError(
            f"{type(output).__name__} has no loss although labels were given; allowed: models that return "
            "one, or no labels, and handle.loss() added to yours"
        )
    output.loss = output.loss + more
    return output
