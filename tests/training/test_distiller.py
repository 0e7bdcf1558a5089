"""A student: what it starts from, what it learns from, and what its checkpoint remembers."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import nn

from gatewright.data import Corpus
from gatewright.errors import UserError
from gatewright.experiments.twin import dense_twin
from gatewright.papers import get_paper
from gatewright.parts import MLP, MoELayer
from gatewright.training.distiller import Distiller, copy_non_experts, digest_of
from gatewright.training.trainer import Trainer
from tests.oracle.distillation import mixed_loss
from tests.training.runs import FixedText, advance, digest, fixed_trainer, tiny_run

TEXT = cast(Corpus, FixedText())
CHANGES: dict[str, Any] = {"width": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "context": 16}


def teacher_of(paper: str, steps: int = 3, **changes: Any) -> Trainer:
    own = {
        **CHANGES,
        "num_experts": 4,
        "num_selected": 2,
        "expert_width": 8,
        "ffn_width": 16,
        "vocab_size": 256,
        **changes,
    }
    known = {field.name for field in dataclasses.fields(get_paper(paper).Settings)}
    settings = get_paper(paper).Settings(**{k: v for k, v in own.items() if k in known})
    trainer = fixed_trainer(paper=paper, model=settings)
    advance(trainer, steps)
    return trainer


def distiller(teacher: Trainer, steps: int = 6, **options: Any) -> Distiller:
    paper = teacher.run.paper
    run = dataclasses.replace(
        tiny_run([], steps=steps), paper=paper, model=dense_twin(paper, teacher.settings), seed=7
    )
    return Distiller(run, TEXT, "student", teacher.model, **options)


@pytest.mark.parametrize("paper", ["switch", "mixtral", "deepseek_moe", "deepseek_v3", "sparsely_gated"])
def test_non_expert_weights_are_the_teacher_s_and_no_other(paper: str):
    teacher = teacher_of(paper, moe_layers="every:2", num_shared_experts=1)
    student = distiller(teacher)
    plain = Trainer(student.run, TEXT)
    given, own = dict(teacher.model.named_parameters()), dict(student.model.named_parameters())
    start = student.start
    assert sorted([*start.copied, *start.new]) == sorted(own)
    for name in start.copied:
        assert torch.equal(own[name], given[name]), name
    fresh = dict(plain.model.named_parameters())
    for name in start.new:
        assert torch.equal(own[name], fresh[name]), name
    # New are the feed-forward layers that were sparse, and they alone; nothing of an expert comes along.
    places = {name.rpartition("feed_forward.")[0] for name in start.new}
    assert all("feed_forward." in name for name in start.new)
    assert places == {name.rpartition("feed_forward.")[0] for name in given if "feed_forward.router" in name}
    assert {"embedding.weight", "layers.0.attention.q.weight"} & set(own) <= set(start.copied)
    assert "embedding.weight" in start.copied


def test_without_copies_it_starts_as_its_seed_says():
    teacher = teacher_of("switch")
    student = distiller(teacher, copy=False)
    plain = Trainer(student.run, TEXT)
    assert student.start.copied == ()
    for name, value in student.model.named_parameters():
        assert torch.equal(value, dict(plain.model.named_parameters())[name])
    # The averaged weights start where the live ones do.
    copied = distiller(teacher)
    assert copied.average is not None
    for live, average in zip(copied.model.parameters(), copied.average.values, strict=True):
        assert torch.equal(live, average)


class Sparse(MoELayer):
    """A sparse layer that holds a weight of the name and shape that a dense one has."""

    def __init__(self) -> None:
        super().__init__(4, 2, 1, 4, weights="raw")
        self.w_down = nn.Parameter(torch.ones(4, 8))


def test_nothing_of_a_sparse_layer_is_copied():
    teacher = nn.ModuleDict({"feed_forward": Sparse(), "other": nn.Linear(2, 2)})
    student = nn.ModuleDict({"feed_forward": MLP(4, 8), "other": nn.Linear(2, 2)})
    found = copy_non_experts(teacher, student)
    assert found.copied == ("other.weight", "other.bias")
    assert found.new == ("feed_forward.w_in", "feed_forward.w_down")
    assert (student["feed_forward"].w_down != 1).all()


def test_a_weight_of_another_shape_is_new():
    one, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 5))
    assert copy_non_experts(one, other).new == ("0.weight", "0.bias")


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_is_the_slow_one_with_the_teacher_in_evaluation(weight: float):
    # This router adds noise in training, and its LSTM drops: a teacher in training mode says something else.
    teacher = teacher_of("sparsely_gated", steps=20)
    teacher.model.train()
    student = distiller(teacher, teacher_weight=weight)
    assert not teacher.model.training
    assert student.model.training
    rows = torch.from_numpy(student.stream.batch(0))
    key = torch.tensor(5)
    with torch.no_grad():
        own, taught = student.model(rows[:, :-1], key=key).logits, teacher.model(rows[:, :-1]).logits
    lists = [logits.double().flatten(0, 1).tolist() for logits in (own, taught)]
    slow = mixed_loss(lists[0], lists[1], rows[:, 1:].flatten().tolist(), weight)
    found, _ = student.loss_of(rows, key, cast(Any, None))
    assert found.total.item() == pytest.approx(slow, rel=1e-5)


def test_the_teacher_stays_as_it_is_and_the_student_learns():
    teacher = teacher_of("switch")
    before = digest_of(teacher.model)
    student = distiller(teacher, steps=20)
    losses = advance(student, 20)
    assert losses[-1] < losses[0]
    assert digest_of(teacher.model) == before
    assert all(p.grad is None for p in teacher.model.parameters())


def test_weight_0_is_a_plain_run_from_the_same_start():
    teacher = teacher_of("switch")
    student = distiller(teacher, teacher_weight=0.0, copy=False)
    plain = Trainer(student.run, TEXT)
    assert advance(student, 6) == advance(plain, 6)
    assert student.checkpoint().state["distillation"]["teacher_weight"] == 0


def test_it_resumes_bit_for_bit_and_only_under_the_same_teacher():
    teacher = teacher_of("switch")
    whole, begun = distiller(teacher), distiller(teacher)
    advance(whole, 6)
    advance(begun, 3)
    held, again = begun.checkpoint(), distiller(teacher)
    again.restore(held)
    advance(again, 3)
    assert digest(again.checkpoint()) == digest(whole.checkpoint())
    for other, what in (
        (distiller(teacher, teacher_weight=0.5), "teacher_weight is 0.5 but the run was begun with 0.25"),
        (distiller(teacher, copy=False), "copy is False"),
        (distiller(teacher_of("switch", steps=4)), "teacher is "),
    ):
        with pytest.raises(UserError, match=what):
            other.restore(held)
    # A plain run's checkpoint lacks what a student's has.
    with pytest.raises(UserError, match="lacks distillation"):
        again.restore(Trainer(again.run, TEXT).checkpoint())
