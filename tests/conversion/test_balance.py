"""A balance loss on adopted checkpoints: one meaning, and what other libraries got wrong, each as a test."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.conversion import RouterRecorder, attach_balance
from gatewright.errors import UserError
from gatewright.parts import Stats, balance_loss, z_loss

hf = pytest.importorskip("tests.conversion.families", exc_type=ImportError)

WEIGHT = 0.5
GATE = "model.layers.{}.mlp.gate.weight"


def rows(number: int, length: int = 9) -> Tensor:
    """Return sequences of random ids."""
    return torch.randint(3, 40, (number, length), generator=torch.Generator().manual_seed(2))


def grads(model: Any) -> dict[str, Tensor]:
    """Return the gradients so far, and forget them."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Compare gradients by their largest difference."""
    error, name = hf.furthest(one, other)
    assert error < 1e-5, name


def of_the_sum(model: Any, loss: Any, ids: Tensor, **more: Any) -> dict[str, Tensor]:
    """Return the gradients of task + WEIGHT * loss, written out."""
    with RouterRecorder(model) as recorder:
        task = model(ids, labels=ids, **more).loss
        (task + WEIGHT * loss(recorder.stats)).backward()
    return grads(model)


@pytest.mark.parametrize("family", hf.WHOLE)
def test_the_models_own_loss_becomes_task_plus_weight_times_loss(family: str):
    # transformers#44242: a coefficient without effect; Automodel#1408: a loss whose gradient never flowed.
    model, ids = hf.whole_model(family).train(), rows(2)
    expected = of_the_sum(model, balance_loss, ids)
    attached = attach_balance(model, "balance", WEIGHT)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert_same(grads(model), expected)
    attached.detach()
    assert (out.loss - model(ids, labels=ids).loss).item() == pytest.approx(
        WEIGHT * float(attached.value), rel=1e-4
    )
    as_tuple = attach_balance(model, "balance", WEIGHT)
    assert model(ids, labels=ids, return_dict=False)[0].item() == pytest.approx(out.loss.item(), rel=1e-6)
    as_tuple.detach()


def test_loads_become_even():
    model, ids = hf.whole_model("mixtral").train(), rows(16)
    optimizer = torch.optim.Adam([layer.mlp.gate.weight for layer in model.model.layers], lr=0.03)
    attached = attach_balance(model, "balance", 1.0)
    values = []
    for _ in range(30):
        model(ids)
        attached.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(attached.value))
    assert values[0] > 1.15
    assert 1.0 <= values[-1] < 1.02


def test_without_labels_the_loss_waits_for_your_sum():
    model, ids = hf.whole_model("mixtral").train(), rows(2)
    attached = attach_balance(model, z_loss, WEIGHT)
    model(ids)
    assert attached.loss().item() == pytest.approx(WEIGHT * float(attached.value))
    with pytest.raises(UserError, match="no balance loss waits to be added"):
        attached.loss()
    model(ids, labels=ids)
    with pytest.raises(UserError, match="its own loss holds it"):
        attached.loss()
    # Where labels are kept back, as the Trainer does for a loss function of yours, and nobody adds the loss.
    model(ids)
    with pytest.raises(UserError, match="the balance loss of the pass before was never added"):
        model(ids)


def test_layers_are_not_pooled():
    # transformers#28255: five layers that are each as lopsided as can be, each to another expert, look even
    # when their counts and scores are summed first: E sum f P = 5 * 5 (1/5 * 1/5) = 1. Each has 5 (1 * 1).
    model, ids = hf.whole_model("mixtral").train(), rows(2)
    attached = attach_balance(model, "balance", WEIGHT)
    model(ids, labels=ids)
    some = next(iter(attached.stats.values()))
    records = {}
    for expert in range(5):
        one = torch.zeros(5)
        one[expert] = 4.0
        changed = {"counts": one.long(), "score_sums": one, "tokens": torch.tensor(4)}
        records[f"layer {expert}"] = dataclasses.replace(some, **changed)
    f = sum(record.counts / 20 for record in records.values())
    p = sum(record.score_sums / 20 for record in records.values())
    assert float(5 * (f * p).sum()) == pytest.approx(1)
    assert balance_loss(Stats(records)).item() == 5.0
    # And in a model: the attached value is the mean of the layers' own.
    single = [balance_loss(Stats({name: one})).item() for name, one in attached.stats.items()]
    assert float(attached.value) == pytest.approx(sum(single) / 2)
    assert max(single) > 1.0


def test_padding_is_not_counted():
    # transformers PR 28517.
    model, ids = hf.whole_model("mixtral").train(), rows(2)
    attached = attach_balance(model, "balance", WEIGHT)
    model(ids[:, :5], labels=ids[:, :5])
    expected = attached.value
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    model(ids, labels=torch.where(mask.bool(), ids, -100), attention_mask=mask)
    assert float(attached.value) == pytest.approx(float(expected), rel=1e-5)


def test_scores_are_one_softmax_of_the_logits():
    # transformers#45120: softmax of a softmax, which is nearly even whatever the router says.
    model, ids = hf.whole_model("olmoe").train(), rows(2)
    attached = attach_balance(model, "balance", WEIGHT)
    logits = model(ids, labels=ids, output_router_logits=False).logits
    assert logits.requires_grad
    attached.detach()
    handed = model(ids, output_router_logits=True).router_logits
    slow = []
    for layer in handed:
        p = torch.exp(layer - layer.max(dim=1, keepdim=True).values)
        p = (p / p.sum(dim=1, keepdim=True)).mean(dim=0)
        counts = torch.zeros(5)
        for row in layer.tolist():
            for expert in sorted(range(5), key=lambda e, row=row: -row[e])[:2]:
                counts[expert] += 1
        slow.append(5 * (counts / counts.sum() * p).sum().item())
    assert float(attached.value) == pytest.approx(sum(slow) / 2, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulation_as_the_trainer_does_it_changes_nothing(parts: int):
    # transformers#48690, ms-swift#5627, Automodel PR 3359: weight times the number of micro-batches.
    model, ids = hf.whole_model("mixtral").train(), rows(4)
    expected = of_the_sum(model, z_loss, ids)
    attached = attach_balance(model, "z", WEIGHT)
    whole = torch.tensor(ids[:, 1:].numel())
    for part in ids.chunk(parts):
        model(part, labels=part, num_items_in_batch=whole).loss.backward()
    assert_same(grads(model), expected)
    attached.detach()


@pytest.mark.parametrize("loss", ["z", "sequence_balance"])
def test_the_trainer_of_transformers_takes_one_step_however_it_accumulates(loss: str, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in rows(4)]
    found = []
    for parts in (1, 2, 4):
        model = hf.whole_model("mixtral").train()
        attach_balance(model, loss, 10.0)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts, max_grad_norm=0.0, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=True, logging_strategy="no", lr_scheduler_type="constant",
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None)).train()
        found.append({name: (p.detach() - before[name]) / 0.1 for name, p in model.named_parameters()})
    # A difference of weights is coarser than a gradient.
    assert max(hf.furthest(other, found[0]) for other in found[1:])[0] < 1e-3


def test_accumulation_by_hand_divides_task_and_balance_alike():
    model, ids = hf.whole_model("mixtral").train(), rows(4)
    expected = of_the_sum(model, z_loss, ids)
    attached = attach_balance(model, "z", WEIGHT)
    for part in ids.chunk(2):
        (model(part, labels=part).loss / 2).backward()
    assert_same(grads(model), expected)
    attached.detach()


def test_ranks_as_the_trainer_has_them_change_nothing():
    # Each rank has half of the batch; the Trainer multiplies by the ranks, and their gradients are averaged.
    model, ids = hf.whole_model("mixtral").train(), rows(4)
    expected = of_the_sum(model, z_loss, ids)
    attached = attach_balance(model, "z", WEIGHT)
    whole, ranks = ids[:, 1:].numel(), 2
    for part in ids.chunk(ranks):
        (model(part, labels=part, num_items_in_batch=whole).loss * ranks / ranks).backward()
    assert_same(grads(model), expected)
    attached.detach()


def test_global_counts_over_ranks_give_the_loss_of_the_whole_batch():
    # Megatron#3672: a global loss that gets weaker with every rank.
    model, ids = hf.whole_model("mixtral").train(), rows(4)
    expected = of_the_sum(model, balance_loss, ids)
    with RouterRecorder(model) as recorder, torch.no_grad():
        model(ids)
    names = sorted(recorder.stats)
    whole_counts = torch.cat([recorder.stats[name].counts for name in names])
    attached = attach_balance(
        model, "balance", WEIGHT, scope="global_batch", all_reduce=lambda counts: whole_counts
    )
    whole = ids[:, 1:].numel()
    for part in ids.chunk(2):
        model(part, labels=part, num_items_in_batch=whole).loss.backward()
        attached.step()  # each rank has its own
    assert_same(grads(model), expected)
    attached.detach()


def test_global_counts_run_over_micro_batches_and_are_forgotten_at_the_step():
    model, ids = hf.whole_model("mixtral").train(), rows(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attached = attach_balance(model, "balance", WEIGHT, scope="global_batch", optimizer=optimizer)
    first, second = ids.chunk(2)
    model(first, labels=first).loss.backward()
    alone = float(attached.value)
    model(second, labels=second).loss.backward()
    after = float(attached.value)
    optimizer.step()
    model(second, labels=second)
    assert float(attached.value) != pytest.approx(after, rel=1e-6)
    optimizer.step()
    model(first, labels=first)
    assert float(attached.value) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("loss", ["balance", "z"])
def test_checkpointing_changes_no_gradient(loss: str):
    # torchtitan PR 4772: a global loss that could not be had together with recomputation.
    model, ids = hf.whole_model("mixtral").train(), rows(2)
    scope = {"scope": "global_batch"} if loss == "balance" else {}
    attached = attach_balance(model, loss, WEIGHT, **scope)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected, value = grads(model), float(attached.value)
    attached.step()
    model.activation_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert float(attached.value) == pytest.approx(value, rel=1e-6)
    assert_same(grads(model), expected)


def test_reentrant_checkpointing_is_refused_as_no_loss_would_reach_the_router():
    model, ids = hf.whole_model("mixtral").train(), rows(2)
    model.activation_checkpointing_enable({"use_reentrant": True})
    attach_balance(model, "balance", WEIGHT)
    with pytest.raises(UserError, match=r"model.layers.0.mlp ran without gradients.*use_reentrant=False"):
        model(ids, labels=ids, use_cache=False)


def test_evaluation_adds_nothing():
    model, ids = hf.whole_model("mixtral"), rows(2)
    expected = model(ids, labels=ids).loss.item()
    attached = attach_balance(model, "balance", WEIGHT)
    assert model(ids, labels=ids).loss.item() == expected
    model.train()
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == expected
    assert attached.value is None
    assert model(ids, labels=ids).loss.item() > expected


def test_a_second_loss_and_wrong_words_are_refused():
    model = hf.whole_model("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(UserError, match=r"adds a balance loss of its own .* without output_router_logits it"):
        attach_balance(model)
    model.config.output_router_logits = False
    attached = attach_balance(model.train())
    with pytest.raises(UserError, match="adds a balance loss of its own"):
        model(rows(2), labels=rows(2), output_router_logits=True)
    attached.detach()
    with pytest.raises(UserError, match=r"loss 'balanec' is unknown here; did you mean 'balance'\?"):
        attach_balance(model, "balanec")
    with pytest.raises(UserError, match="scope 'sequence' with loss 'z'; allowed: 'micro_batch'"):
        attach_balance(model, "z", scope="sequence")
    with pytest.raises(UserError, match="scope 'batch' with loss 'balance'"):
        attach_balance(model, scope="batch")
