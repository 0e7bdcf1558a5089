"""A fine-tuner: its rows, its loss at the labels alone, the choice by dev score, resuming to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gatewright.backbones import Decoder
from gatewright.data.tasks import PARTS, Example, Task
from gatewright.data.tokenizer import ByteTokenizer
from gatewright.errors import UserError
from gatewright.papers import get_paper
from gatewright.papers.switch import Settings
from gatewright.training.checkpoint import newest_checkpoint
from gatewright.training.distiller import digest_of
from gatewright.training.finetuner import FineTuner, TaughtFineTuner, copy_weights, fit, tuned_run
from gatewright.training.interrupt import StopRequest
from gatewright.training.task_rows import SEPARATOR, TaskRows
from tests.training.runs import advance, digest, tiny_run

LABELS = ("cold", "warm up")
SETTINGS = Settings(
    width=16, num_heads=2, head_dim=8, num_experts=4, expert_width=16, ffn_width=16, context=32,
    capacity_factor=None, dropout=0.1, expert_dropout=0.4,
)  # fmt: skip
END = 256


def hand_task(count: int = 12) -> Task:
    """Texts of two kinds: the letters say which."""
    parts = {}
    for number, part in enumerate(PARTS):
        kinds = [place % 2 for place in range(count)]
        texts = [f"{'ab'[kind] * 4} {number}{place}" for place, kind in enumerate(kinds)]
        parts[part] = tuple(Example(text, kind, text) for text, kind in zip(texts, kinds, strict=True))
    return Task("hand", LABELS, parts)


def rows(context: int = 32, seed: int = 0) -> TaskRows:
    return TaskRows(hand_task(), ByteTokenizer(), context, seed)


def trained(seed: int = 0, settings: Settings = SETTINGS) -> Decoder:
    torch.manual_seed(seed)
    made = get_paper("switch").build(settings)
    assert isinstance(made, Decoder)
    return made


def run_of(steps: int = 8, **changes: Any) -> Any:
    own = dataclasses.replace(tiny_run([]), paper="switch", model=SETTINGS)
    return tuned_run(own, SETTINGS, rows(), 4, steps, **{"evaluations": 4, "checkpoint_every": 3, **changes})


def tuner(steps: int = 8, seed: int = 0, start: nn.Module | None = None, **changes: Any) -> FineTuner:
    return FineTuner(run_of(steps, seed=seed, **changes), rows(seed=seed), start or trained())


def test_a_row_is_text_separator_label_and_end():
    own = rows()
    row = own.rows("train")[1]
    tail = own.label_at + len("warm up") + 1
    assert bytes(row[own.label_at : tail - 1].astype(np.uint8).tolist()) == b"warm up"
    assert len(row) == tail == own.window + 1
    # The longest text is "bbbb 011": eight bytes; a shorter one has one more end before it.
    assert own.label_at == 1 + 8 + len(SEPARATOR)
    assert row[:2].tolist() == [END, END]
    assert bytes(row[2 : own.label_at].astype(np.uint8).tolist()) == b"bbbb 01" + SEPARATOR.encode()
    assert own.rows("train")[0, -4:].tolist() == [END] * 4
    assert own.candidates == [[*b"cold", END], [*b"warm up", END]]


def test_a_long_text_keeps_its_beginning_and_a_context_without_room_is_refused():
    own = rows(context=15)
    assert own.window == 15
    assert bytes(own.prompts["train"][0][1:5].astype(np.uint8).tolist()) == b"aaaa"
    with pytest.raises(UserError, match="context 11 has no room for a text with its label; allowed: 12 or"):
        rows(context=11)
    assert rows(context=12).window == 12


def test_batches_pass_every_row_once_an_epoch_and_depend_on_the_seed():
    one, other = rows(), rows(seed=1)
    stream = one.stream(4, one.window)
    epochs = [np.concatenate([stream.batch(3 * epoch + i) for i in range(3)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, one.rows("train").tolist()))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(stream.batch(0), other.stream(4, one.window).batch(0))
    with pytest.raises(UserError, match="13 rows a step; allowed: 1 to 12"):
        one.stream(13, one.window)


def test_the_loss_is_of_label_and_end_alone():
    own = tuner()
    own.model.eval()
    batch = torch.from_numpy(own.text.rows("train")[:2])
    output, targets = own.ask(own.model, batch, torch.tensor(3))
    assert targets.tolist() == [[*b"cold", END, *b"warm up", END]]
    logits = own.model(batch[:, :-1]).logits.detach()
    first = own.text.label_at - 1
    wanted = torch.cat([logits[0, first : first + 5], logits[1, first : first + 8]])
    assert torch.equal(output.logits[0].detach(), wanted)
    slow = -wanted.log_softmax(-1).gather(-1, targets[0][:, None]).mean()
    assert float(own.objective(output, targets).task.detach()) == pytest.approx(float(slow), rel=1e-5)


def test_it_starts_from_the_trained_weights_which_stay():
    start = trained(1)
    before = digest_of(start)
    own = tuner(start=start)
    assert digest_of(own.model) == before
    advance(own, 2)
    assert digest_of(start) == before != digest_of(own.model)
    other = dataclasses.replace(SETTINGS, num_experts=2)
    with pytest.raises(UserError, match="the trained weights are not those of this model"):
        copy_weights(trained(), get_paper("switch").build(other))
    with pytest.raises(UserError, match="paper 'switch' is no decoder with attention"):
        tuner(start=nn.Linear(2, 2))


def test_it_learns_the_task_and_keeps_the_weights_of_the_best_dev_score(tmp_path: Path):
    own = tuner(steps=120, learning_rate=1e-2, evaluations=6)
    assert fit(own, tmp_path, StopRequest(), lambda share, state: None)
    curve = own.history.curve
    assert [point["step"] for point in curve] == [20, 40, 60, 80, 100, 120]
    best = max(curve, key=lambda point: (point["accuracy"], -point["nats"]))
    assert own.best_at == {key: best[key] for key in ("step", "accuracy", "nats")}
    assert own.score("dev") == (best["accuracy"], pytest.approx(best["nats"], rel=1e-6))
    assert best["accuracy"] == own.score("test").accuracy == 1.0


def test_a_later_worse_score_does_not_displace_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    told = iter([(0.5, 1.0), (0.75, 0.9), (0.75, 0.9), (0.6, 0.1)])
    seen: list[str] = []
    own = tuner(steps=4)
    evaluate = own.evaluate

    def scored() -> Any:
        seen.append(digest_of(own.model))
        return evaluate()

    monkeypatch.setattr(own, "evaluate", scored)
    monkeypatch.setattr(
        "gatewright.training.finetuner.score_of",
        lambda *_: type("Told", (), dict(zip(("accuracy", "nats"), next(told), strict=True))),
    )
    fit(own, tmp_path, StopRequest(), lambda share, state: None)
    assert len(set(seen)) == 4
    assert digest_of(own.model) == seen[1]
    assert own.best_at["step"] == 2


def test_it_resumes_to_the_bit_and_from_no_other_start(tmp_path: Path):
    whole = tuner()
    assert fit(whole, tmp_path / "whole", StopRequest(), lambda share, state: None)
    begun, stop = tuner(), StopRequest()

    def show(share: float, state: str) -> None:
        stop.asked = share >= 5 / 8

    begun.run = dataclasses.replace(begun.run, log_every=1)
    assert not fit(begun, tmp_path / "begun", stop, show)
    held = newest_checkpoint(tmp_path / "begun")
    assert held is not None
    assert held.step == 5
    again = tuner()
    again.restore(held)
    assert fit(again, tmp_path / "begun", StopRequest(), lambda share, state: None)
    one, other = newest_checkpoint(tmp_path / "whole"), newest_checkpoint(tmp_path / "begun")
    assert one is not None
    assert other is not None
    for own in (one, other):
        own.state["history"].pop("log")
        own.state["history"].pop("recent")
    assert digest(one) == digest(other)
    with pytest.raises(UserError, match="begun from other trained weights; allowed: the same RUN"):
        tuner(start=trained(1)).restore(held)


def test_a_teacher_has_its_share_and_the_start_is_not_the_teacher_s():
    start, teacher = trained(), trained(2)
    own = TaughtFineTuner(run_of(), rows(), start, "student", teacher, 0.25, False)
    assert digest_of(own.model) == digest_of(start)
    batch, key = torch.from_numpy(own.text.rows("train")[:3]), torch.tensor(4)
    own.model.eval()
    found, _ = own.loss_of(batch, key, None)  # type: ignore[arg-type]
    output, targets = own.ask(own.model, batch, key)
    told = own.ask(own.teacher, batch, key)[0].logits.softmax(-1)
    soft = -(told * output.logits.log_softmax(-1)).sum(-1).mean()
    plain = own.objective(output, targets)
    wanted = plain.total + 0.25 * (soft - plain.task)
    assert float(found.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    advance(own, 2)
    assert digest_of(teacher) == own.teacher_digest
