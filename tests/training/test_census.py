"""What a continuation depends on is saved, all of it; what differs is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.data import Corpus, open_corpus
from gatewright.errors import UserError
from gatewright.training import TrainRun
from gatewright.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from gatewright.training.trainer import Trainer
from tests.training.runs import advance, digest, tiny_run

Server = Callable[..., dict[str, Any]]
BEFORE, AFTER = 5, 2


def changed(value: Any) -> Any:
    """Return the value with something else in it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, list):
        return [*value[:-1], changed(value[-1])] if value else [1]
    if isinstance(value, dict):
        key = sorted(value)[-1]
        return {**value, key: changed(value[key])}
    raise TypeError(type(value))


@pytest.fixture(scope="module")
def halfway(data: list[str], corpus: Corpus) -> tuple[TrainRun, Checkpoint, str]:
    """A run, its checkpoint after BEFORE steps, and the digest of the state AFTER steps later."""
    run = tiny_run(data, steps=20, log_every=2, evaluations=10, num_layers=1)
    trainer = Trainer(run, corpus)
    advance(trainer, BEFORE)
    trainer.evaluate()
    middle = copy.deepcopy(trainer.checkpoint())
    middle = dataclasses.replace(middle, state=json.loads(json.dumps(middle.state)))
    advance(trainer, AFTER)
    return run, middle, digest(trainer.checkpoint())


def continued(run: TrainRun, corpus: Corpus, checkpoint: Checkpoint) -> str:
    trainer = Trainer(run, corpus)
    trainer.restore(checkpoint)
    advance(trainer, AFTER)
    return digest(trainer.checkpoint())


def test_a_restored_trainer_goes_on_bit_for_bit(halfway: tuple[TrainRun, Checkpoint, str], corpus: Corpus):
    run, middle, golden = halfway
    assert continued(run, corpus, middle) == golden


def test_a_checkpoint_stays_as_it_is_while_a_trainer_goes_on_from_it(
    halfway: tuple[TrainRun, Checkpoint, str], corpus: Corpus
):
    run, middle, _ = halfway
    before = digest(middle)
    continued(run, corpus, middle)
    assert digest(middle) == before


def test_every_saved_tensor_and_number_matters(halfway: tuple[TrainRun, Checkpoint, str], corpus: Corpus):
    run, middle, golden = halfway
    assert set(middle.tensors) == {"model", "optimizer", "average"}
    assert set(middle.state) == {"step", "seconds", "history", "corpus", "average_updates"}
    spoiled: dict[str, Checkpoint] = {}
    for file, tensors in middle.tensors.items():
        for name, tensor in tensors.items():
            # One bit of one number: the least that a file can be wrong by.
            wrong = tensor.detach().clone()
            wrong.view(-1)[-1] = torch.nextafter(wrong.view(-1)[-1], torch.tensor(9.0)) + 1e-3
            kept = {**middle.tensors, file: {**tensors, name: wrong}}
            spoiled[f"{file}/{name}"] = dataclasses.replace(middle, tensors=kept)
    for key in set(middle.state) - {"history"}:
        state = {**middle.state, key: changed(middle.state[key])}
        spoiled[key] = dataclasses.replace(middle, state=state)
    for key, held in middle.state["history"].items():
        history = {**middle.state["history"], key: changed(held)}
        spoiled[f"history/{key}"] = dataclasses.replace(middle, state={**middle.state, "history": history})
    unnoticed, refused = [], set()
    for name, checkpoint in spoiled.items():
        try:
            if continued(run, corpus, checkpoint) == golden:
                unnoticed.append(name)
        except UserError:
            refused.add(name)
    # Seconds are the clock's, not compared by the digest; the next test holds them.
    assert unnoticed == ["seconds"]
    assert refused == {"step", "corpus"}
    assert len(spoiled) > 50


def test_every_missing_tensor_and_number_is_refused(
    halfway: tuple[TrainRun, Checkpoint, str], corpus: Corpus
):
    run, middle, _ = halfway
    for file, tensors in middle.tensors.items():
        lacking = {f: t for f, t in middle.tensors.items() if f != file}
        with pytest.raises(UserError, match=file):
            Trainer(run, corpus).restore(dataclasses.replace(middle, tensors=lacking))
        for name in list(tensors)[::5]:
            rest = {**middle.tensors, file: {n: t for n, t in tensors.items() if n != name}}
            with pytest.raises(UserError, match=f"the checkpoint's {file} holds other tensors"):
                Trainer(run, corpus).restore(dataclasses.replace(middle, tensors=rest))
    for key in middle.state:
        state = {k: v for k, v in middle.state.items() if k != key}
        expected = "other text" if key == "corpus" else f"lacks {key}"
        with pytest.raises(UserError, match=expected):
            Trainer(run, corpus).restore(dataclasses.replace(middle, state=state))


def attributes(trainer: Trainer) -> dict[str, Any]:
    """Return everything a trainer holds that a step may change, by name."""
    held = {
        key: value
        for key, value in vars(trainer).items()
        if isinstance(value, (int, float, str, list, dict, torch.Tensor))
        and key not in ("_names", "_state", "_routers", "validation_text")
    }
    held |= {f"history.{key}": value for key, value in vars(trainer.history).items()}
    for name, tensor in (*trainer.model.named_parameters(), *trainer.model.named_buffers()):
        held[f"model.{name}"] = tensor.detach().clone()
    assert trainer.average is not None
    held |= {f"average.{number}": value.clone() for number, value in enumerate(trainer.average.values)}
    held["average.updates"] = trainer.average.updates
    for number, state in enumerate(trainer.optimizer.state.values()):
        held |= {f"optimizer.{number}.{key}": value.clone() for key, value in state.items()}
    held["rates"] = [group["lr"] for group in trainer.optimizer.param_groups]
    return copy.deepcopy(held)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_everything_that_training_changes_is_restored(
    halfway: tuple[TrainRun, Checkpoint, str], corpus: Corpus
):
    run, middle, _ = halfway
    trainer = Trainer(run, corpus)
    fresh = attributes(trainer)
    trainer.restore(middle)
    advance(trainer, 2)
    trained = attributes(trainer)
    moved = {name for name in trained if name not in fresh or not same(trained[name], fresh[name])}
    assert {"step", "seconds", "history.recent", "average.updates", "model.head.weight"} <= moved
    again = Trainer(run, corpus)
    again.restore(trainer.checkpoint())
    restored = attributes(again)
    # The rate is set anew before every step.
    assert {name for name in moved if not same(trained[name], restored.get(name))} <= {"rates"}


def test_training_draws_no_random_numbers(data: list[str], corpus: Corpus):
    trainer = Trainer(tiny_run(data), corpus)
    before = torch.get_rng_state()
    advance(trainer, 2)
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_seconds_go_on_from_where_they_were(halfway: tuple[TrainRun, Checkpoint, str], corpus: Corpus):
    run, middle, _ = halfway
    trainer = Trainer(run, corpus)
    trainer.restore(dataclasses.replace(middle, state={**middle.state, "seconds": 1000.0}))
    assert trainer.advance()["seconds"] > 1000.0


def test_other_text_or_tokenizer_is_refused(
    halfway: tuple[TrainRun, Checkpoint, str], data: list[str], shared: Path
):
    run, middle, _ = halfway
    for other in (
        open_corpus(data[:1], cache=shared / "cache"),
        open_corpus(data, cache=shared / "cache", tokenizer="bpe:300"),
        open_corpus(data, cache=shared / "cache", seed=1),
    ):
        with pytest.raises(UserError, match="trained on other text or another tokenizer"):
            Trainer(run, other).restore(middle)


def test_a_checkpoint_on_its_way_through_files_is_the_same(
    halfway: tuple[TrainRun, Checkpoint, str], corpus: Corpus, tmp_path: Path
):
    run, middle, golden = halfway
    save_checkpoint(tmp_path, middle, keep=1)
    held = newest_checkpoint(tmp_path)
    assert held is not None
    assert digest(held) == digest(middle)
    assert continued(run, corpus, held) == golden
