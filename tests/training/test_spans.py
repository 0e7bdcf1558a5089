"""Encoder-decoders in the training loop: masked spans of real windows, resume, evaluation, reports."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gatewright.cli import main
from gatewright.errors import UserError
from gatewright.evaluation import masked_bits_per_byte
from gatewright.generation import generate
from gatewright.objectives import SpanCorruption, Spans
from gatewright.papers import get_paper
from gatewright.training import TrainRun, loop, train
from gatewright.training.evaluate import EvalRun, evaluate_run
from gatewright.training.load import load_run
from gatewright.training.tasks import ask
from tests.training.runs import LOOP, advance, final_digest, fixed_trainer

TINY: dict[str, Any] = {"width": 16, "num_heads": 2, "head_dim": 8, "num_experts": 4, "expert_width": 16}
TINY |= {"ffn_width": 16, "context": 32, "num_sentinels": 2}


def tiny(paper: str, **changes: Any) -> Any:
    return get_paper(paper).Settings(**TINY | changes)


def run_of(paper: str, data: list[str], out: Path, steps: int, **changes: Any) -> TrainRun:
    loop_settings = LOOP | {"eval_bytes": 400} | changes
    tokens = steps * LOOP["batch_tokens"]
    model = tiny(paper)
    return TrainRun(**loop_settings, paper=paper, model=model, data=tuple(data), out=str(out), tokens=tokens)


@pytest.mark.parametrize("paper", ["switch_t5", "gshard"])
def test_the_loss_falls(paper: str):
    trainer = fixed_trainer(30, paper, tiny(paper), batch_tokens=256, learning_rate=2e-2)
    losses = advance(trainer, 30)
    assert sum(losses[-5:]) / 5 < 0.75 * sum(losses[:5]) / 5
    bits = trainer.evaluate()
    assert 0 < bits.bits_per_byte < 12
    assert trainer.step_tokens == 256


def test_masks_follow_from_seed_step_and_micro_batch():
    trainer = fixed_trainer(4, "switch_t5", tiny("switch_t5"))
    rows = torch.from_numpy(trainer.stream.batch(0))
    asked = [ask(trainer.model, trainer.objective, rows, torch.tensor(k))[1] for k in (1, 1, 2)]
    assert torch.equal(asked[0], asked[1])
    assert not torch.equal(asked[0], asked[2])
    # Window of 32 tokens: 5 masked in 2 runs, and the end.
    assert asked[0].shape == (2, 5 + 2 + 1)


def test_what_an_expert_meets_is_what_its_stack_reads():
    # 8 windows of 32: sources of 32 - 5 + 2 + 1 = 30, targets of 8; one of 4 experts each: 60 and 16.
    trainer = fixed_trainer(4, "switch_t5", tiny("switch_t5"), batch_tokens=256)
    assert trainer.tokens_per_expert == 8 * 8 / 4


def test_bits_per_byte_of_masked_text_by_hand():
    settings = tiny("switch_t5", capacity_factor=None)
    torch.manual_seed(0)
    model, spans = get_paper("switch_t5").build(settings), get_paper("switch_t5").objective(settings).spans
    # 70 tokens: two windows of 32 and the last 6, of which one is masked. Id 256 stands for no byte.
    tokens = np.array([*range(60), *[256] * 10])
    lengths = np.array([1] * 256 + [0])
    objective = SpanCorruption(spans=spans)
    found = masked_bits_per_byte(model, {"a": tokens}, lengths, objective, batch_size=8)
    seen: list[torch.Tensor] = []
    original = Spans.mask
    nats, size = 0.0, 0
    model.eval()

    def watched(self: Spans, key: torch.Tensor, rows: int) -> torch.Tensor:
        mask = original(self, key, rows)
        seen.append(mask)
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spans, "mask", watched)
        again = masked_bits_per_byte(model, {"a": tokens}, lengths, objective, batch_size=1)
    assert again.bits_per_byte == pytest.approx(found.bits_per_byte, rel=1e-6)
    assert [mask.shape for mask in seen] == [(2, 32), (1, 6)]
    for mask, first in zip(seen, (0, 64), strict=True):
        own = dataclasses.replace(spans, length=mask.shape[1])
        rows = torch.from_numpy(tokens[first : first + mask.numel()]).view(mask.shape)
        pair = own.corrupt(rows, mask)
        with torch.no_grad():
            logits = model(pair.source, pair.target).logits
        nats += float(F.cross_entropy(logits.flatten(0, 1), pair.labels.flatten(), reduction="sum"))
        size += int((rows[mask] != 256).sum())
    assert found.num_bytes == size
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_a_resumed_run_ends_with_the_same_bits(data: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    train(run_of("gshard", data, tmp_path / "whole", 10))
    cut = run_of("gshard", data, tmp_path / "cut", 10, checkpoint_every=3)
    stopped = iter([False] * 6 + [True] * 99)

    class Stop:
        def __bool__(self) -> bool:
            return next(stopped)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_on_signals", lambda: contextlib.nullcontext(Stop()))
        assert train(cut).stopped
    train(dataclasses.replace(cut, resume=True))
    assert final_digest(tmp_path / "cut") == final_digest(tmp_path / "whole")


def test_from_the_command_line_to_the_report(data: list[str], tmp_path: Path, capsys):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**TINY, **LOOP, "eval_bytes": 400}.items()]
    argv = ["train", "switch_t5", "--data", *data, *flags, "--tokens", "256", "--out", str(tmp_path / "run")]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "encoder.layers.1.router" in page
    # Two texts at a time, as in training: capacity counts over them.
    assert main(["eval", str(tmp_path / "run"), "--eval-bytes", "400", "--batch-size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] == pytest.approx(
        result["bits_per_byte"], rel=1e-5
    )
    found = evaluate_run(tmp_path / "run", EvalRun(eval_bytes=400, batch_size=2))
    assert found.domains == pytest.approx(result["domains"], rel=1e-5)
    assert main(["generate", str(tmp_path / "run")]) == 2
    assert "a EncoderDecoder continues no text" in capsys.readouterr().err
    assert main(["race", "switch_t5", "--out", str(tmp_path / "race")]) == 2
    assert "is an encoder-decoder, for `train`, `eval` and `plan`" in capsys.readouterr().err


def test_a_loaded_run_continues_no_text(data: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    train(run_of("switch_t5", data, tmp_path / "run", 2))
    loaded: Any = load_run(tmp_path / "run")
    with pytest.raises(UserError, match="continues no text; allowed: a decoder's run; targets of an encoder"):
        generate(loaded.model, [1, 2], max_new_tokens=3)


def test_plan_of_an_encoder_decoder(capsys):
    assert main(["plan", "switch-base", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_parameters"] == pytest.approx(7.4e9, rel=0.003)
    assert found["training_gb"] is None
    # 2 x 12 layers x 12 heads x 64 numbers x 2 bytes, for 512 ids of the source and 114 of the target.
    assert found["kv_cache_gb"] == pytest.approx(2 * 12 * 768 * 2 * (512 + 114) / 1e9)
    assert main(["plan", "gshard-600b", "--context", "256"]) == 0
    text = capsys.readouterr().out
    assert "context 256" in text
    assert "no training figures: the activations of encoder-decoders are not counted yet" in text
