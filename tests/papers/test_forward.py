"""Each wired paper's model, output and gradients, against a slow one written from the paper's equations.

The slow model shares nothing with the library but the weights: positions, heads, tokens and experts in loops,
rotations as complex numbers, in fp64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatewright.papers import get_paper
from gatewright.parts import MoELayer

B, S = 2, 9
Weights = dict[str, Tensor]


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-5).sqrt() * scale


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate one head's vector as complex numbers made of its two halves."""
    half = len(x) // 2
    angle = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def attend(rows: list[Tensor], w: Weights, layer: str, s: Any, theta: float) -> list[Tensor]:
    """Causal attention of one text, one head of one position at a time."""
    head_dim, kv_heads = s.head_dim, getattr(s, "num_kv_heads", s.num_heads)
    query, key, value = (w[f"{layer}.attention.{n}.weight"] for n in ("query", "key", "value"))
    q, k = [query @ row for row in rows], [key @ row for row in rows]
    if f"{layer}.attention.query_norm.weight" in w:
        q = [rms(row, w[f"{layer}.attention.query_norm.weight"]) for row in q]
        k = [rms(row, w[f"{layer}.attention.key_norm.weight"]) for row in k]
    out = []
    for t in range(len(rows)):
        mixed = []
        for h in range(s.num_heads):
            shared = h * kv_heads // s.num_heads
            own = slice(h * head_dim, (h + 1) * head_dim)
            theirs = slice(shared * head_dim, (shared + 1) * head_dim)
            mine = turn(q[t][own], t, theta)
            scores = torch.stack([mine @ turn(k[u][theirs], u, theta) for u in range(t + 1)])
            weights = (scores / math.sqrt(head_dim)).exp()
            values = torch.stack([(value @ rows[u])[theirs] for u in range(t + 1)])
            mixed.append((weights / weights.sum()) @ values)
        out.append(w[f"{layer}.attention.output.weight"] @ torch.cat(mixed))
    return out


def ffn(x: Tensor, w_in: Tensor, w_down: Tensor, activation: str) -> Tensor:
    gate, up = (w_in @ x).chunk(2)
    bent = (
        gate * torch.sigmoid(gate) if activation == "swiglu" else gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    )
    return w_down @ (bent * up)


def mix(
    x: Tensor, w: Weights, layer: str, rule: str, num_selected: int, seats: list[float], seen: Any
) -> Tensor:
    """One token through its experts by the paper's rule; `seats` is what each expert has left."""
    activation = "geglu" if rule == "switch" else "swiglu"
    logits = w[f"{layer}.feed_forward.router.weight"] @ x
    scores = logits.exp() / logits.exp().sum()
    values = scores.tolist()
    best = sorted(range(len(values)), key=lambda e: (-values[e], e))[:num_selected]
    seen.append((scores, logits, best))
    chosen = logits[best].exp() / logits[best].exp().sum() if rule == "mixtral" else scores[best]
    y = torch.zeros_like(x)
    for weight, e in zip(chosen, best, strict=True):
        if seats[e] > 0:
            seats[e] -= 1
            w_in, w_down = (w[f"{layer}.feed_forward.experts.{n}"][e] for n in ("w_gate_up", "w_down"))
            y = y + weight * ffn(x, w_in, w_down, activation)
    return y


def slow_loss(w: Weights, tokens: Tensor, rule: str, s: Any) -> tuple[Tensor, Tensor]:
    """Return (logits [B, S, V], total loss) from the papers' equations."""
    theta = getattr(s, "rope_theta", 10_000.0)
    k = 1 if rule == "switch" else s.num_selected
    texts = [[w["embedding.weight"][i] for i in row] for row in tokens[:, :-1].tolist()]
    balance, z = [], []
    for i in range(s.num_layers):
        layer, seen = f"layers.{i}", []
        texts = [
            [x + a for x, a in zip(rows, attend(normed, w, layer, s, theta), strict=True)]
            for rows in texts
            for normed in [[rms(x, w[f"{layer}.attention_norm.weight"]) for x in rows]]
        ]
        sparse = f"{layer}.feed_forward.router.weight" in w
        limit = math.ceil(s.capacity_factor * B * S / s.num_experts) if rule == "switch" else math.inf
        seats = [limit] * s.num_experts
        for rows in texts:
            for t, x in enumerate(rows):
                normed = rms(x, w[f"{layer}.feed_forward_norm.weight"])
                if sparse:
                    rows[t] = x + mix(normed, w, layer, rule, k, seats, seen)
                else:
                    w_in, w_down = (w[f"{layer}.feed_forward.{n}"] for n in ("w_in", "w_down"))
                    rows[t] = x + ffn(normed, w_in, w_down, "geglu" if rule == "switch" else "swiglu")
        if sparse:
            count = torch.zeros(s.num_experts, dtype=torch.float64)
            for _, _, best in seen:
                count[best] += 1
            share = count / (len(seen) * k)
            mean_score = torch.stack([scores for scores, _, _ in seen]).mean(0)
            balance.append(s.num_experts * (share * mean_score).sum())
            z.append(torch.stack([logits.exp().sum().log() ** 2 for _, logits, _ in seen]).mean())
    logits = torch.stack(
        [torch.stack([w["head.weight"] @ rms(x, w["norm.weight"]) for x in rows]) for rows in texts]
    )
    total = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    # Switch adds its layers' losses; the other two average them.
    joined = torch.stack(balance).sum() if rule == "switch" else torch.stack(balance).mean()
    total = total + s.balance_weight * joined
    if rule == "olmoe":
        total = total + s.z_weight * torch.stack(z).mean()
    return logits, total


SMALL = {"vocab_size": 11, "width": 8, "num_layers": 2, "head_dim": 4, "num_experts": 5, "expert_width": 6}
CASES = {
    "mixtral": SMALL | {"num_heads": 4, "num_kv_heads": 2, "num_selected": 2, "rope_theta": 100.0},
    "olmoe": SMALL | {"num_selected": 3, "moe_layers": "first_dense:1", "ffn_width": 12},
    "switch": SMALL | {"num_layers": 4, "capacity_factor": 0.8, "ffn_width": 12},
}


@pytest.mark.parametrize("paper", CASES)
def test_forward_loss_and_gradients_are_the_slow_ones(paper: str):
    file = get_paper(paper)
    settings = replace(file.Settings(), **CASES[paper])
    torch.manual_seed(4)
    model = file.build(settings).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Norms that scale, and weights large enough that every part matters.
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.5)
    tokens = torch.randint(0, settings.vocab_size, (B, S + 1))
    output = model(tokens[:, :-1])
    loss = file.objective(settings)(output, tokens[:, 1:])
    gradients = torch.autograd.grad(loss.total, list(model.parameters()))

    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits, total = slow_loss(copies, tokens, paper, settings)
    torch.testing.assert_close(output.logits, logits, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(loss.total, total, rtol=1e-11, atol=0.0)
    expected = torch.autograd.grad(total, list(copies.values()))
    for name, ours, theirs in zip(copies, gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    if paper == "switch":
        dropped = sum(int(record.dropped_by_rank.sum()) for record in output.stats.values())
        assert dropped > 0, "the case drops nothing, so it does not try the capacity"


def test_papers_choose_their_weight_forms_and_layers():
    def layers(paper: str) -> list[MoELayer]:
        file = get_paper(paper)
        return [m for m in file.build(file.Settings(num_layers=4)).modules() if isinstance(m, MoELayer)]

    assert {layer.weights for layer in layers("mixtral")} == {"softmax_selected"}
    assert {layer.weights for layer in layers("olmoe")} == {"raw"}
    assert {(m.weights, m.num_selected, m.capacity_factor) for m in layers("switch")} == {("raw", 1, 1.25)}
    assert [len(layers(paper)) for paper in ("mixtral", "olmoe", "switch")] == [4, 4, 2]


def test_olmoe_starts_from_a_cut_normal_and_switch_from_a_tenth():
    torch.manual_seed(0)
    olmoe = get_paper("olmoe").build(get_paper("olmoe").Settings())
    expert = olmoe.layers[0].feed_forward.experts.w_gate_up.detach()
    assert float(expert.std()) == pytest.approx(0.02 * 0.987, rel=0.02)
    assert float(expert.abs().max()) <= 0.06
    switch = get_paper("switch").build(get_paper("switch").Settings())
    expert = switch.layers[1].feed_forward.experts.w_gate_up.detach()
    assert float(expert.std()) == pytest.approx(0.88 * (0.1 / 64) ** 0.5, rel=0.02)
