"""Selection biases of adopted checkpoints: they move once per step, against the loads of all its tokens."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.conversion import RouterRecorder, attach_balance, attach_bias, trainer_callback
from gatewright.conversion.biases import biases_of
from gatewright.errors import UserError

hf = pytest.importorskip("tests.conversion.families", exc_type=ImportError)
tiny = pytest.importorskip("tests.conversion.tiny", exc_type=ImportError)

LAYER = "model.layers.1.mlp"


def rows(number: int, length: int = 9) -> Tensor:
    """Return sequences of random ids."""
    return torch.randint(3, 40, (number, length), generator=torch.Generator().manual_seed(2))


def deepseek() -> Any:
    """Return a model with one biased layer of six experts, in training."""
    return hf.whole_model("deepseek_v3").train()


def held(model: Any) -> Tensor:
    """Return the bias itself."""
    bias: Tensor = model.model.layers[1].mlp.gate.e_score_correction_bias
    return bias


def test_a_bias_moves_against_the_loads_of_the_whole_step():
    # DeepSeek-V3#761 and others: "where is the bias update?"; transformers has none.
    model, ids = deepseek(), rows(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attached = attach_bias(model, rate=0.01, optimizer=optimizer)
    with RouterRecorder(model) as recorder:
        counts = torch.zeros(6, dtype=torch.int64)
        for part in ids.chunk(2):
            model(part, labels=part).loss.backward()
            counts += recorder.stats[LAYER].counts
    assert int(counts.sum()) == 4 * 9 * 2
    assert torch.equal(attached.counts[LAYER], counts)
    assert not attached.stats[LAYER].score_sums.requires_grad  # counting keeps no graph alive
    assert (held(model) == 0).all()  # not before the optimizer's step
    optimizer.step()
    expected = [0.01 * math.copysign(1, 12 - count) if count != 12 else 0.0 for count in counts.tolist()]
    assert held(model).tolist() == pytest.approx(expected)
    assert any(expected)
    assert model.state_dict()[f"{LAYER}.gate.e_score_correction_bias"].tolist() == pytest.approx(expected)
    before = held(model).clone()
    optimizer.step()  # nothing was counted since
    assert torch.equal(held(model), before)


def test_loads_become_even():
    model, ids = deepseek(), rows(16)
    attached = attach_bias(model, rate=0.02)
    largest = []
    for _ in range(40):
        model(ids, labels=ids)
        counts = attached.counts[LAYER]
        largest.append(float(counts.max() / counts.float().mean()))
        attached.step()
    assert largest[0] > 1.5
    assert largest[-1] < 1.15


def test_neither_evaluation_nor_sampling_counts_nor_moves():
    model, ids = deepseek(), rows(2)
    attached = attach_bias(model, rate=0.01)
    model.eval()
    model(ids)
    model.train()
    with torch.no_grad():
        model(ids)
    assert dict(attached.counts) == {}
    attached.step()
    assert (held(model) == 0).all()


def test_padding_is_not_a_load_and_recomputation_counts_once():
    model, ids = deepseek(), rows(2)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    attached = attach_bias(model)
    model(ids[:, :5], labels=ids[:, :5]).loss.backward()
    expected = attached.counts[LAYER].clone()
    attached.step()
    held(model).zero_()
    model.activation_checkpointing_enable()
    model(ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
    assert torch.equal(attached.counts[LAYER], expected)
    assert int(expected.sum()) == 2 * 5 * 2


def test_every_rank_moves_by_the_counts_of_all():
    model, ids = deepseek(), rows(2)
    asked = []

    def all_reduce(counts: Tensor) -> Tensor:
        asked.append(counts.clone())
        return torch.tensor([9, 0, 3, 3, 0, 3])

    attached = attach_bias(model, rate=0.01, all_reduce=all_reduce)
    for part in ids.chunk(2):
        model(part, labels=part)
    attached.step()
    # 18 assignments over six experts: three each.
    assert held(model).tolist() == pytest.approx([-0.01, 0.01, 0, 0, 0.01, 0])
    assert len(asked) == 1  # once per step, not per micro-batch
    assert int(asked[0].sum()) == 2 * 9 * 2


def test_small_steps_are_felt_in_bf16_and_a_loaded_bias_counts():
    model, ids = deepseek(), rows(2)
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias = torch.ones(6, dtype=torch.bfloat16)
    attached = attach_bias(model, rate=0.001, all_reduce=lambda _: torch.tensor([6, 0, 3, 3, 3, 3]))
    for _ in range(8):
        model(ids, labels=ids)
        attached.step()
    # 1 + 8 * 0.001: bf16 knows 1 and 1.0078, and a step of 0.001 by itself is rounded away.
    assert attached.biases[LAYER].rule.bias.tolist() == pytest.approx([0.992, 1.008, 1, 1, 1, 1])
    assert float(gate.e_score_correction_bias[1]) > 1
    gate.e_score_correction_bias.fill_(0.5)
    model(ids, labels=ids)
    attached.step()
    assert attached.biases[LAYER].rule.bias.tolist() == pytest.approx([0.499, 0.501, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("family", tiny.BIASED)
def test_every_biased_family_is_found_and_chooses_by_what_was_moved(family: str):
    model = tiny.tiny_model(family).train()
    attached = attach_bias(model, rate=0.5)
    assert attached.biases
    name, bias = next(iter(attached.biases.items()))
    with torch.no_grad():
        bias.held.view(-1)[3] = 100.0
        model(tiny.ids(), use_cache=False)
    counts = attached.stats[name].counts
    assert int(counts[3]) == 14  # every token
    model(tiny.ids(), use_cache=False)
    attached.step()
    assert float(bias.held.view(-1)[3]) == 99.5


def test_families_with_a_bias_are_those_whose_source_has_one():
    words = ("e_score_correction_bias", "expert_bias")
    families = tiny.every_family()
    assert set(tiny.BIASED) == {one for one in families if any(word in hf.sources()[one] for word in words)}


def test_models_without_a_bias_and_biases_of_an_optimizer_are_refused():
    with pytest.raises(UserError, match=r"MixtralForCausalLM has no selection bias .*attach_balance"):
        attach_bias(hf.whole_model("mixtral"))
    model = deepseek()
    held(model).requires_grad_()
    with pytest.raises(UserError, match="takes gradients, so an optimizer moves it too"):
        biases_of(model, 0.001, "sign")


def test_in_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, ids = deepseek(), rows(8)
    bias = attach_bias(model, rate=0.25)
    balance = attach_balance(model, "balance", 0.1, scope="global_batch")
    moved = []
    step = bias.step
    bias.step = lambda: (moved.append(int(bias.counts[LAYER].sum())), step())  # type: ignore[method-assign]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=args, train_dataset=data, callbacks=[trainer_callback(bias, balance)]).train()
    # Two steps of four sequences of nine tokens, two experts each.
    assert moved == [4 * 9 * 2, 4 * 9 * 2]
    # Each of two steps moved a bias by 0.25 or not at all.
    assert set((held(model) / 0.25).abs().round(decimals=4).tolist()) <= {0.0, 1.0, 2.0}
    assert bool((held(model) != 0).any())
    assert balance.value is not None


RANKS = """
import os, sys, torch
from gatewright.conversion import sum_over_ranks
rank = int(os.fork() == 0)
counts = torch.tensor([1, 2 ** 40, rank])
alone = sum_over_ranks(counts)
torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=rank, world_size=2)
told = [alone.tolist(), sum_over_ranks(counts).tolist(), counts.tolist()]
assert told == [[1, 2 ** 40, rank], [2, 2 ** 41, 1], [1, 2 ** 40, rank]], told
torch.distributed.destroy_process_group()
if rank == 0:
    assert os.wait()[1] == 0
    print("both agree")
"""


def test_counts_are_summed_over_two_processes(tmp_path):
    argv = [sys.executable, "-c", RANKS, f"file://{tmp_path}/ranks"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "both agree", done.stderr
