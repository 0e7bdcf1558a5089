"""Training on translations: any model of pairs, bit for bit after a stop, padding no part of the loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.data import ByteTokenizer
from gatewright.data.translations import Ends, Translations, encode_lines
from gatewright.errors import Diverged, UserError
from gatewright.objectives import NextToken
from gatewright.papers import get_paper
from gatewright.training.pairs import PairRun, PairTrainer, held_out_loss, read, train_pairs

WORDS = {"en": ["one", "two", "six", "ten"], "es": ["uno", "dos", "seis", "diez"]}
# Every two words, in both languages.
TEXTS = {name: [f"{a} {b}" for a in own for b in own] for name, own in WORDS.items()}
DIRECTIONS = (("es", "en"), ("en", "es"))
SMALL: dict[str, Any] = {"width": 16, "num_experts": 4, "expert_width": 16}
TINY: dict[str, dict[str, Any]] = {
    "sparsely_gated_mt": {"num_tags": 2, "num_selected": 2},
    "gshard": {"num_sentinels": 2, "head_dim": 8, "ffn_width": 16, "context": 8},
    "switch_t5": {"num_sentinels": 2, "head_dim": 8, "ffn_width": 16, "context": 8},
}


def trainer_of(paper: str = "sparsely_gated_mt", steps: int = 6, **changes: Any) -> PairTrainer:
    """Return what trains a tiny model of a paper on the words; tags are its sentinels' ids."""
    file = get_paper(paper)
    settings = file.Settings(vocab_size=257, **SMALL, **TINY[paper])
    ids = encode_lines(TEXTS, np.arange(16), ByteTokenizer(), 20)
    stream = Translations(ids, DIRECTIONS, Ends({"en": 257, "es": 258}, 259), batch_size=8)
    torch.manual_seed(0)
    run = PairRun(steps, 1e-2, warmup_steps=4, **changes)
    return PairTrainer(file.build(settings), file.objective(settings), stream, run)


@pytest.mark.parametrize("paper", TINY)
def test_the_loss_falls_in_any_model_of_pairs(paper: str):
    trainer = trainer_of(paper, 20)
    losses = [float(trainer.advance().task.detach()) for _ in range(20)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    total, count = held_out_loss(trainer.model, trainer.stream.in_order(0))  # type: ignore[attr-defined]
    assert count == sum(len(text) + 1 for text in TEXTS["en"])
    assert total / count < 0.8 * losses[0]
    assert trainer.model.training


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path):
    whole = trainer_of()
    train_pairs(whole, tmp_path / "whole")
    first = trainer_of(checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train_pairs(first, tmp_path / "run", lambda step, loss: stop_at(step, 5))
    second = trainer_of()
    train_pairs(second, tmp_path / "run")
    assert second.step == 6
    assert second.tokens == whole.tokens
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert [point["step"] for point in whole.curve] == [1, 2, 3, 4, 5, 6]
    assert whole.curve == second.curve


def stop_at(step: int, last: int) -> None:
    if step == last:
        raise KeyboardInterrupt


def test_padding_is_no_part_of_the_loss():
    trainer = trainer_of()
    batch = trainer.stream.batch(0)
    assert not batch.target_mask.all()
    trainer.model.eval()
    changed = dataclasses.replace(
        batch,
        source=np.where(batch.source_mask, batch.source, 7),
        target=np.where(batch.target_mask, batch.target, 7),
        labels=np.where(batch.target_mask, batch.labels, 7),
    )
    one, other = (float(NextToken()(*read(trainer.model, own)).task.detach()) for own in (batch, changed))
    assert one == pytest.approx(other, rel=1e-6)
    assert read(trainer.model, batch)[1].numel() == batch.target_mask.sum()


def test_a_loss_that_is_not_finite_stops_before_the_weights_move():
    trainer = trainer_of()
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = torch.nan  # type: ignore[union-attr, operator]
    before = trainer.model.embedding.weight.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(Diverged, match="step 1: loss nan"):
        trainer.advance()
    assert torch.equal(trainer.model.embedding.weight, before)  # type: ignore[union-attr, arg-type]


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match="steps 0, checkpoint_every 200"):
        PairRun(0)
