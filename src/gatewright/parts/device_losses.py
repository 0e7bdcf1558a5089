"""Losses over devices, for experts spread in contiguous blocks: device balance and communication balance."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.balancing import mean_over_routers, per_token
from gatewright.parts.rule_losses import sums_of
from gatewright.parts.stats import RouterStats, Stats


def device_loss(stats: Stats, num_devices: int) -> Float[Tensor, ""]:
    """Return the device-level balance loss, a 0-d tensor: value 1 when devices get equal shares.

    Equation: DeepSeekMoE and DeepSeek-V2, expert groups on D devices: mean over routers of sum_d f'_d P'_d,
    with f'_d the mean over the device's experts of E / (K T) * counts_e, P'_d the sum of their mean scores.
    Device d holds experts d E / D to (d + 1) E / D - 1. Gradient flows through P' only. How experts of one
    device share its work costs nothing here. With D = E it is `balance_loss`, with D = 1 the constant 1.
    Scope: the micro-batch; recomputation, padding and orders of experts that keep the devices change nothing.
    The papers' loss is one layer's and is added per layer (theirs times the number of MoE layers).
    Raises: UserError unless D divides every router's E.
    """
    losses = []
    for name, record in stats.items():
        size = _experts_per_device(name, record, num_devices)
        assigned = record.counts.sum().clamp(min=1)
        f = record.num_experts * record.counts.to(record.score_sums.dtype) / assigned
        probability = per_token(record.score_sums, record)
        losses.append((f.view(-1, size).mean(dim=1) * probability.view(-1, size).sum(dim=1)).sum())
    return mean_over_routers(losses)


def communication_loss(stats: Stats, num_devices: int, devices_kept: int) -> Float[Tensor, ""]:
    """Return the communication balance loss, a 0-d tensor: value 1 when devices receive equally many tokens.

    Equation: DeepSeek-V2's third loss: mean over routers of sum_d f''_d P''_d, with f''_d = D / (M T) times
    the tokens that device d receives, and P''_d the sum of its experts' mean scores. A token counts once per
    device, however many of its experts are there ("device_counts" [D] among `sums`); M = `devices_kept` is
    how many devices a token may go to. Gradient flows through P'' only. Tokens that use fewer than M devices
    lower it.
    Scope, blocks of experts, invariances and the factor over layers: as `device_loss`.
    Raises: UserError unless D divides every router's E, for M outside 1..D, and where no router has
    device_counts of D devices.
    """
    if not 1 <= devices_kept <= num_devices:
        raise UserError(
            f"devices_kept {devices_kept} of num_devices {num_devices}; allowed: 1 to num_devices"
        )
    losses = []
    for name, record, received in sums_of(stats, "device_counts", "communication"):
        size = _experts_per_device(name, record, num_devices)
        if received.shape != (num_devices,):
            raise UserError(
                f"router {name!r} counts tokens of {received.numel()} devices, num_devices is {num_devices}; "
                "allowed: the router's own number of device groups"
            )
        dtype = record.score_sums.dtype
        f = num_devices / devices_kept * per_token(received.detach().to(dtype), record)
        losses.append((f * per_token(record.score_sums, record).view(-1, size).sum(dim=1)).sum())
    return mean_over_routers(losses)


def _experts_per_device(name: str, record: RouterStats, num_devices: int) -> int:
    """Return E / D."""
    if num_devices < 1 or record.num_experts % num_devices:
        raise UserError(
            f"num_devices {num_devices} for the {record.num_experts} experts of router {name!r}; allowed: a "
            "divisor of their number"
        )
    return record.num_experts // num_devices
