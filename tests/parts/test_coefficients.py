"""Every factor: a library's formula, written out, times its coefficient is our loss times our weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatewright.parts import balance_loss
from gatewright.parts.coefficients import CONVENTIONS, coefficient_for
from gatewright.parts.losses import LOSSES
from tests.parts.seen import layers_of, random_logits

T, E, L = 24, 6, 3
THEIRS = 0.013


def top(scores: Tensor, k: int) -> Tensor:
    """Return the K highest experts [T, K]."""
    return scores.argsort(dim=-1, descending=True)[:, :k]


def hits(scores: Tensor, k: int) -> Tensor:
    """Return how often each expert is chosen, [E]."""
    return torch.bincount(top(scores, k).flatten(), minlength=scores.shape[-1]).double()


def switch(layers: list[Tensor], k: int, alpha: float) -> Tensor:
    """Return alpha * N * sum_i f_i P_i, added per layer (eq 4-6)."""
    total = torch.zeros((), dtype=torch.float64)
    for p in layers:
        total = total + alpha * E * (hits(p, 1) / len(p) * p.mean(dim=0)).sum()
    return total


def gshard(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return k * l_aux, l_aux = (1/E) sum_e (c_e / S) m_e, added per layer (algorithm 1)."""
    return sum(coefficient * (1 / E) * (hits(p, 1) / len(p) * p.mean(dim=0)).sum() for p in layers)


def fairscale(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return the sum of each layer's mean(me * ce)."""
    found = []
    for gates in layers:
        me, ce = gates.mean(dim=0), F.one_hot(top(gates, 1)[:, 0], E).double().mean(dim=0)
        found.append(torch.mean(me * ce))
    return coefficient * torch.stack(found).sum()


def squared(layers: list[Tensor]) -> list[Tensor]:
    """Return mean(density_1_proxy * density_1) * E^2 of each layer, as Mesh-TensorFlow writes it."""
    found = []
    for gates in layers:
        density, proxy = F.one_hot(top(gates, 1)[:, 0], E).double().mean(dim=0), gates.mean(dim=0)
        found.append(torch.mean(proxy * density) * E**2)
    return found


def mesh_tensorflow(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return the losses of all layers, each appended to the sum; lingvo and DeepSpeed write the same."""
    return coefficient * torch.stack(squared(layers)).sum()


def fairseq(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return the same with layers averaged, moe_gate_loss_combine_method = "average"."""
    return coefficient * torch.stack(squared(layers)).mean()


def fastmoe_switch(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return sum(fraction_expert * prob_expert) * tot_expert of each layer, added by the caller."""
    found = []
    for scores in layers:
        fraction, prob = hits(scores, 1) / len(scores), scores.sum(dim=0) / len(scores)
        found.append((fraction * prob).sum() * E)
    return coefficient * torch.stack(found).sum()


def tutel(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return sum(me * ce) / S with ce in units of E / S, added by the caller."""
    found = []
    for scores in layers:
        mask = F.one_hot(top(scores, 1)[:, 0], E).double() * (E / len(scores))
        found.append(torch.sum(scores.sum(dim=0) * mask.sum(dim=0)) / len(scores))
    return coefficient * torch.stack(found).sum()


def megatron(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return sum(aggregated probs * tokens per expert) * E * coeff / (topk * T * T), injected per layer."""
    return sum((p.sum(dim=0) * hits(p, k)).sum() * (E * coefficient / (k * len(p) * len(p))) for p in layers)


def megatron_sequences(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return seq_aux_loss: the same per sequence (here of 6 tokens), divided by how many there are."""
    return sum(
        sum(megatron([sequence], k, coefficient) for sequence in p.split(6)) / (len(p) // 6) for p in layers
    )


def megablocks(layers: list[Tensor], k: int, weight: float) -> Tensor:
    """Return E * weight / (L * T * k) * sum over layers of dot(tokens per expert, mean scores)."""
    scale = E * weight / (len(layers) * len(layers[0]) * k)
    return scale * sum((hits(p, k) * p.mean(dim=0)).sum() for p in layers)


def flaxformer(layers: list[Tensor], k: int, factor: float) -> Tensor:
    """Return factor * mean over layers of mean(tokens per expert * probability) * E^2, one-hot over all k."""
    found = []
    for p in layers:
        mask = F.one_hot(top(p, k), E).amax(dim=1).double()
        found.append(torch.mean(mask.mean(dim=0) * p.mean(dim=0)) * E**2)
    return factor * torch.stack(found).mean()


def transformers(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return load_balancing_loss_func: layers pooled along the tokens, then E * sum(tokens * probability)."""
    pooled = torch.cat(layers)
    expert_mask = F.one_hot(top(pooled, k), E).double()
    tokens_per_expert, router_prob = expert_mask.mean(dim=0), pooled.mean(dim=0)
    return coefficient * E * torch.sum(tokens_per_expert * router_prob.unsqueeze(0))


def deepseek(layers: list[Tensor], k: int, alpha: float) -> Tensor:
    """Return alpha * sum_i f_i P_i, f_i = N / (K T) * tokens of i, of each layer, added."""
    return sum(alpha * (E / (k * len(p)) * hits(p, k) * p.mean(dim=0)).sum() for p in layers)


def deepseek_sequences(layers: list[Tensor], k: int, alpha: float) -> Tensor:
    """Return eq 17-20 of V3 for sequences of 6 tokens: the mean over sequences, layers added."""
    return sum(torch.stack([deepseek([part], k, alpha) for part in p.split(6)]).mean() for p in layers)


def automodel(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return sum(f_i P_i), f_i = load * E / (topk * tokens), per gate; times the tokens, then over them."""
    total = torch.zeros((), dtype=torch.float64)
    for scores in layers:
        f = hits(scores, k) * E / (k * len(scores))
        total = total + torch.sum(f * (scores.sum(dim=0) / len(scores))) * len(scores)
    return coefficient * total / len(layers[0])


def torchtitan(layers: list[Tensor], k: int, coefficient: float) -> Tensor:
    """Return T * L_bal of each layer over the valid tokens: f_i = E / (K T) hits, p_i of scores / sum."""
    total = torch.zeros((), dtype=torch.float64)
    for scores in layers:
        share = scores / scores.sum(dim=-1, keepdim=True)
        total = total + (E / (k * len(scores)) * hits(scores, k) * share.sum(dim=0)).sum()
    return coefficient * total / len(layers[0])


Formula = Callable[[list[Tensor], int, float], Tensor]
# (name, loss, K, tokens per sequence or None, their formula, MoE layers for which the factor is exact)
EXACT: tuple[tuple[str, str, int, int | None, Formula, int], ...] = (
    ("switch", "balance", 1, None, switch, L),
    ("gshard", "gshard", 2, None, gshard, L),
    ("glam", "gshard", 2, None, mesh_tensorflow, L),
    ("st_moe", "gshard", 2, None, switch, L),
    ("mixtral", "balance", 2, None, transformers, 1),
    ("qwen3", "balance", 2, None, transformers, 1),
    ("deepseek_moe", "balance", 3, None, deepseek, L),
    ("deepseek_moe_16b", "balance", 3, None, deepseek, L),
    ("deepseek_v2", "balance", 3, None, deepseek, L),
    ("deepseek_v3", "sequence_balance", 3, 6, deepseek_sequences, L),
    ("olmoe", "balance", 4, None, megablocks, L),
    ("transformers", "balance", 3, None, transformers, 1),
    ("megatron", "balance", 3, None, megatron, L),
    ("megatron", "sequence_balance", 3, 6, megatron_sequences, L),
    ("nemo", "balance", 3, None, automodel, L),
    ("torchtitan", "balance", 3, None, torchtitan, L),
    ("megablocks", "balance", 3, None, megablocks, L),
    ("flaxformer", "balance", 3, None, flaxformer, L),
    ("mesh_tensorflow", "gshard", 2, None, mesh_tensorflow, L),
    ("lingvo", "gshard", 2, None, mesh_tensorflow, L),
    ("fairscale", "gshard", 2, None, fairscale, L),
    ("fairseq", "gshard", 2, None, fairseq, L),
    ("deepspeed", "gshard", 2, None, mesh_tensorflow, L),
    ("fastmoe", "gshard", 2, None, mesh_tensorflow, L),
    ("fastmoe", "balance", 1, None, fastmoe_switch, L),
    ("nllb", "balance", 2, None, transformers, 1),
    ("tutel", "gshard", 2, None, tutel, L),
)


def assert_same_effect(theirs: Tensor, ours: Tensor, logits: list[Tensor]) -> None:
    """Fail unless values and gradients agree."""
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-12)
    for one, other in zip(*(torch.autograd.grad(x, logits) for x in (theirs, ours)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("name", "loss", "k", "sequence", "formula", "layers"), EXACT)
def test_the_factor(name: str, loss: str, k: int, sequence: int | None, formula: Formula, layers: int):
    logits = [random_logits(T, E, seed=seed).requires_grad_() for seed in range(layers)]
    theirs = formula([x.softmax(dim=-1) for x in logits], k, THEIRS)
    found = coefficient_for(name, loss, coefficient=THEIRS, num_experts=E, num_selected=k, num_layers=layers)
    assert found.loss == loss
    ours = LOSSES[loss](layers_of(*logits, num_selected=k, group_size=sequence))
    assert_same_effect(theirs, found.weight * ours, logits)


def variation(values: Tensor, unbiased: bool) -> Tensor:
    """Return var / mean^2."""
    return values.var(correction=int(unbiased)) / values.mean() ** 2


@pytest.mark.parametrize("name", ["sparsely_gated", "vmoe", "tutel"])
def test_the_factor_of_squared_variations(name: str):
    # 2017: w * CV^2 with the population variance; V-MoE: lambda / 2 each; Tutel: half of each, unbiased.
    logits = [random_logits(T, E, seed=seed).requires_grad_() for seed in range(L)]
    halves, unbiased = (2 if name == "tutel" else 1), name == "tutel"
    theirs = sum(THEIRS * variation(x.softmax(dim=-1).sum(dim=0), unbiased) / halves for x in logits)
    found = coefficient_for(name, "importance", coefficient=THEIRS, num_experts=E, num_layers=L)
    assert_same_effect(theirs, found.weight * LOSSES["importance"](layers_of(*logits)), logits)
    counted = sum(THEIRS * variation(hits(x.detach(), 2), unbiased) / halves for x in logits)
    found = coefficient_for(name, "load", coefficient=THEIRS, num_experts=E, num_layers=L)
    ours = LOSSES["load"](layers_of(*logits, num_selected=2))
    assert counted.item() == pytest.approx(found.weight * ours.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "added"),
    [("st_moe", True), ("megatron", True), ("nemo", True), ("olmoe", False), ("flaxformer", False)],
)
def test_the_factor_of_the_z_loss(name: str, added: bool):
    logits = [random_logits(T, E, seed=seed).requires_grad_() for seed in range(L)]
    each = torch.stack([THEIRS * x.logsumexp(dim=-1).square().mean() for x in logits])
    found = coefficient_for(name, "z", coefficient=THEIRS, num_layers=L)
    theirs = each.sum() if added else each.mean()
    assert_same_effect(theirs, found.weight * LOSSES["z"](layers_of(*logits)), logits)


def test_the_factor_of_v2s_losses_over_devices():
    # D = 3 devices of 2 experts: a2 sum f' P', f' the mean and P' the sum over a device; layers added.
    logits = [random_logits(T, E, seed=seed).requires_grad_() for seed in range(L)]
    theirs = torch.zeros((), dtype=torch.float64)
    for x in logits:
        p = x.softmax(dim=-1)
        f = E / (2 * T) * hits(p, 2)
        theirs = theirs + THEIRS * (f.view(3, 2).mean(dim=1) * p.mean(dim=0).view(3, 2).sum(dim=1)).sum()
    found = coefficient_for("deepseek_v2", "device", coefficient=THEIRS, num_layers=L)
    assert_same_effect(theirs, found.weight * LOSSES["device"](layers_of(*logits, num_selected=2), 3), logits)


def test_of_pooled_layers_no_factor_is_exact():
    # transformers pools before the product: layers that route alike give K times ours, opposite ones hide.
    x = random_logits(T, E)
    alike = transformers([x.softmax(-1)] * L, 3, 1.0).item()
    assert alike == pytest.approx(3 * balance_loss(layers_of(x, x, x, num_selected=3)).item())
    first, second = torch.zeros(T, E), torch.zeros(T, E)
    first[:, : E // 2], second[:, E // 2 :] = 9.0, 9.0
    hidden = transformers([first.softmax(-1).double(), second.softmax(-1).double()], 3, 1.0).item()
    assert hidden == pytest.approx(3)
    assert 3 * balance_loss(layers_of(first, second, num_selected=3)).item() > 5.9


def test_every_convention_is_tested():
    compared = {(name, loss) for name, loss, *_ in EXACT}
    compared |= {
        (name, loss) for name in ("sparsely_gated", "vmoe", "tutel") for loss in ("importance", "load")
    }
    compared |= {(name, "z") for name in ("st_moe", "megatron", "nemo", "olmoe", "flaxformer")}
    # The communication loss is V2's own formula, worked by hand in test_losses_by_hand; ReMoE's carries its
    # own weight; expert choice has none.
    compared |= {("deepseek_v2", "device"), ("deepseek_v2", "communication"), ("remoe", "relu")}
    compared |= {("expert_choice", "balance")}
    assert compared == {(name, loss) for name, losses in CONVENTIONS.items() for loss in losses}
