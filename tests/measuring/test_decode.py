"""Decoding races: transformers decodes the same ids from the same weights; bytes are those of the experts
that were chosen; a row keeps every round, resumes, and is refused where reading memory spreads.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gatewright.errors import RunFailure, UserError
from gatewright.measuring import DecodeRun, bench_decode, decode, decoders
from gatewright.measuring.decode import agreement, build_decoder, measure_case
from gatewright.measuring.decode_run import Case, decode_record, goals, refusal, told
from gatewright.measuring.decoders import COMPILED, INT8, OURS, THEIRS, Continued

SIZES = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "experts": 4, "expert_width": 24}
SMALL = DecodeRun(**SIZES, vocab_size=97, prompt=9, tokens=6, prefill=20, rounds=11, dtypes=("fp32",))
PLAIN = [name for name in THEIRS if name != COMPILED]  # compiling takes half a minute


class Still:
    """A reader that takes no time to speak of."""

    bytes = 1 << 20

    def call(self) -> None:
        torch.ones(1).sum()


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "_compiled", lambda side, first: (None, "not in tests"))
    monkeypatch.setattr(decode, "Reader", Still)
    monkeypatch.setattr("gatewright.measuring.decode_run.LARGEST_SPREAD", 1e9)


@pytest.mark.parametrize("batch", [1, 8])
def test_every_side_decodes_the_same_ids(batch: int):
    model = build_decoder(SMALL, torch.float32)
    with torch.no_grad():
        model.head.weight.mul_(4)
    prompts = torch.randint(97, (batch, 9), generator=torch.Generator().manual_seed(1))
    found = {}
    for name in (OURS, *PLAIN):
        side = decoders.make_side(name, model, 15)
        with torch.inference_mode():
            first = side.begin(prompts)
        found[name] = decoders.continue_greedily(side, first, 6)
        # The cache is where it was: a second time is the first.
        assert torch.equal(decoders.continue_greedily(side, first, 6).ids, found[name].ids)
    assert found[OURS].ids.unique().numel() >= 3
    for name in PLAIN:
        assert agreement(found[OURS], found[name])["share"] == 1


def test_a_static_cache_is_rewound_as_well():
    model = build_decoder(SMALL, torch.float32)
    side = decoders.make_side(PLAIN[0], model, 15)
    side.compiled = True  # its cache is the compiled side's, its steps are as they were
    prompts = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        first = side.begin(prompts)
    ids = decoders.continue_greedily(side, first, 6).ids
    assert torch.equal(decoders.continue_greedily(side, first, 6).ids, ids)


def test_the_other_model_holds_our_very_weights():
    model = build_decoder(SMALL, torch.bfloat16)
    side = decoders.make_side(PLAIN[0], model, 15)
    theirs = {weight.data_ptr() for weight in side.model.parameters()}
    assert theirs == {weight.data_ptr() for weight in model.parameters()}
    int8 = decoders.in_int8(model)
    assert int8.head.weight is model.head.weight
    assert int8.layers[0].feed_forward.experts.w_in.dtype == torch.int8
    assert model.layers[0].feed_forward.experts.w_in.dtype == torch.bfloat16


def test_bytes_are_those_of_the_chosen_experts():
    model = build_decoder(SMALL, torch.float32)
    prompts = torch.randint(97, (1, 9))
    one = decoders.weight_bytes_per_step(model, prompts, torch.randint(97, (1, 6)))
    expert = 3 * 32 * 24
    attention = 2 * 32 * 32 + 2 * 32 * 16
    # One token: two of four experts in either layer, whichever they are; and one row of the embedding.
    assert one == 4 * (2 * (2 * expert + attention + 4 * 32 + 2 * 32) + 97 * 32 + 32 + 32)
    many = decoders.weight_bytes_per_step(model, prompts.expand(8, 9), torch.randint(97, (8, 6)))
    assert one < many <= one + 4 * (2 * 2 * expert + 7 * 32)


def test_a_row_keeps_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    run = replace(SMALL, kinds=("decode-8", "prefill"), out=str(tmp_path))
    result = bench_decode(run, lines.append)
    record = json.loads((tmp_path / "decode.json").read_text())
    assert record["schema"] == "gatewright.bench.decode.v1"
    assert [row["pass"] for row in record["rows"]] == ["decode-8", "prefill"]
    for row in record["rows"]:
        assert set(row["seconds"]) == {"read", OURS, INT8, *PLAIN}
        assert {len(values) for values in row["seconds"].values()} == {11}
        assert COMPILED in row["left_out"]
        assert row["ratios"]["transformers"]["median"] > 0
    assert len(lines) == 2
    assert "fp32 decode-8: " in result.to_text()
    result.check()

    def again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(decode, "measure_case", again)
    kept = bench_decode(replace(run, resume=True), lines.append)
    assert kept.record["rows"] == record["rows"]
    assert lines[-1].endswith("(kept)")
    with pytest.raises(AssertionError, match="measured again"):
        bench_decode(replace(run, resume=True, tokens=5), lines.append)


def seconds_of(ours: float, theirs: float, read: float = 1.0) -> dict[str, list[float]]:
    return {"read": [read] * 11, OURS: [ours] * 11, INT8: [ours / 2] * 11, PLAIN[0]: [theirs] * 11}


def test_figures_by_hand():
    # 6 tokens of 100 bytes in 2 s are 300 bytes/s, where 1000 bytes/s can be read.
    row = decode_record(Case("fp32", "decode-8"), SMALL, seconds_of(2.0, 4.0), {OURS: 100.0}, 1000, {})
    assert row["bandwidth"]["median"] == 1000
    assert row["bandwidth_share"][OURS]["median"] == pytest.approx(0.3)
    assert row["tokens_per_second"][OURS]["median"] == 24
    assert row["ratios"]["transformers"]["median"] == 0.5
    assert row["ratios"]["int8"]["median"] == 0.5
    assert "0.50 of transformers' best time" in told(row)
    assert [line.split(":")[0] for line in goals([row])] == ["held", "not held"]
    prefill = decode_record(Case("fp32", "prefill"), SMALL, seconds_of(2.0, 1.0), None, 1000, {})
    assert prefill["tokens_per_second"][OURS]["median"] == 10
    assert goals([prefill])[0].startswith("not held: fp32 prefill")


def test_a_busy_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gatewright.measuring.decode_run.LARGEST_SPREAD", 0.25)
    assert refusal(0.25) is None
    assert "reading memory alone spread by 26 %" in str(refusal(0.26))
    row = {"dtype": "fp32", "pass": "prefill", "refused": "busy"}
    with pytest.raises(RunFailure, match="1 of 1 rows refused"):
        decode.DecodeResult({"rows": [row]}, "").check()


def test_ids_part_only_where_they_do():
    ours = Continued(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.full((2, 4), 0.5))
    ours.lead[1, 2] = 0.01
    other = replace(ours, ids=torch.tensor([[1, 2, 3, 4], [5, 6, 0, 8]]))
    found = agreement(ours, other)
    assert (found["rows_equal"], found["share"]) == (1, 0.75)
    assert found["near_ties_only"]
    ours.lead[1, 2] = 0.2
    assert not agreement(ours, other)["near_ties_only"]


def test_a_compilation_that_fails_or_takes_too_long_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()

    def fails(side, first):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(decoders, "compile_steps", fails)
    assert decode._compiled(None, None)[1] == "compiling failed: RuntimeError: no compiler"
    monkeypatch.setattr(decoders, "compile_steps", lambda side, first: 121.0)
    assert decode._compiled(None, None) == (121.0, "compiling took 121 s, more than 120")
    monkeypatch.setattr(decoders, "compile_steps", lambda side, first: 30.0)
    assert decode._compiled(None, None) == (30.0, None)


def test_sizes_that_do_not_fit_are_refused():
    for wrong in ({"heads": 3}, {"kv_heads": 3}, {"layers": 0}, {"rounds": 3}, {"kinds": ()}):
        with pytest.raises(UserError):
            DecodeRun(**wrong)


def test_without_transformers_our_sides_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "transformers_version", lambda: None)
    row = measure_case(Case("fp32", "decode-1"), SMALL, build_decoder(SMALL, torch.float32), Still())
    assert set(row["left_out"]) == set(THEIRS)
    assert row["ratios"]["transformers"] is None
    assert row["ratios"]["int8"]["median"] > 0
