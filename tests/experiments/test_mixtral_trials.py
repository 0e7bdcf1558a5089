"""Mixtral at our size: repeated choices by hand, verdicts, and a tiny run of what is new."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.backbones import count_cost
from gatewright.experiments import mixtral_passkey, mixtral_routing, passkeys, trials
from gatewright.experiments.mixtral_passkey import DENSE, SPARSE
from gatewright.experiments.mixtral_routing import ARM
from gatewright.experiments.registry import TARGETS
from gatewright.experiments.trials import Course, paper_trial
from tests.training.runs import FixedText

SIZES: dict[str, Any] = {"width": 8, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the default corpus."""
    monkeypatch.setattr(trials, "open_corpus", lambda *_, **__: FixedText())


def test_expected_before_it_was_run():
    expected = tomllib.loads((Path(__file__).parents[2] / "reproductions" / "expected.toml").read_text())
    for target in ("mixtral/routing", "mixtral/passkey"):
        paper, name = target.split("/")
        assert set(expected[paper][name]) == {"metric", "sign", "least_effect"}
        assert target in TARGETS


def test_repeated_choices_of_two_windows_by_hand():
    # Window one, neighbours 01-02: first repeats; 02-20: first differs, both common; 20-34: none.
    one = [[0, 1], [0, 2], [2, 0], [3, 4]]
    # Window two: 56-56 first repeats; 56-65 common only; 65-71 none. Across windows nothing is a pair.
    two = [[5, 6], [5, 6], [6, 5], [7, 1]]
    found = mixtral_routing.repeated(torch.tensor([one, two]), 8)
    assert found["first"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert found["any_common"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_shuffling_leaves_what_uneven_use_alone_repeats():
    # Blocks of 64 tokens each with one pair of experts: nearly every neighbour repeats, and shuffled about
    # a quarter, as four pairs are used evenly.
    blocks = torch.arange(4).repeat_interleave(64)
    experts = torch.stack([2 * blocks, 2 * blocks + 1], dim=-1)[None].repeat(8, 1, 1)
    found = mixtral_routing.repeated(experts, 8)
    assert found["first"] == pytest.approx(252 / 255)
    assert found["first_shuffled"] == pytest.approx(0.25, abs=0.06)


def test_chance_is_the_paper_s():
    # 1 / 8, and 1 - (6 / 8)(5 / 7): neither of two others among the two chosen.
    assert mixtral_routing.chances() == pytest.approx({"first": 1 / 8, "any_common": 1 - 6 / 8 * 5 / 7})


def seed(*layers: float) -> dict[str, Any]:
    keys = ("first", "any_common", "first_shuffled", "any_common_shuffled")
    found = {
        d: [dict.fromkeys(keys, own + more) for own in layers] for d, more in (("a", -0.01), ("b", 0.01))
    }
    return {"valid_bpb": 2.0, "repetition": found}


@pytest.mark.parametrize(
    ("seeds", "held"),
    [
        ([seed(0.14, 0.2, 0.25, 0.2), seed(0.13, 0.1, 0.2, 0.16)], True),
        # 1.25 times 12.5 % is 15.6 %: the last layer of seed 1 has less.
        ([seed(0.14, 0.2, 0.25, 0.2), seed(0.13, 0.2, 0.2, 0.15)], False),
        # As often in the first layer as in the last.
        ([seed(0.2, 0.2, 0.25, 0.2), seed(0.13, 0.2, 0.2, 0.2)], False),
        ([seed(0.14, 0.2, 0.25, 0.2), {"valid_bpb": None, "diverged_at": 3}], False),
    ],
    ids=["above", "too near chance", "first layer too", "diverged"],
)
def test_middle_and_last_layer_are_judged_in_every_seed(seeds: list[Any], held: bool):
    found = mixtral_routing.routing_verdict({"arms": {ARM: {"seeds": seeds}}})
    assert found["held"] is held
    if held:
        assert "13.5 %, 22.5 %, 18.0 %" in found["sentence"]
        assert "| chance | 12.5 %" in "\n".join(found["table"])


def test_a_small_model_is_trained_and_its_choices_read(fixed: None, tmp_path: Path):
    own = paper_trial(ARM, "mixtral", num_experts=8, num_selected=2, expert_width=4, context=8, **SIZES)
    course = Course(
        (own,), ARM, steps=2, rows=2, context=8, seeds=(0,), eval_bytes=200, timing_rounds=1, warmup_steps=1
    )
    record = trials.run_course(course, tmp_path, "toy", mixtral_routing.look)
    (found,) = record["arms"][ARM]["seeds"]
    assert list(found["repetition"]) == ["fixed"]
    assert len(found["repetition"]["fixed"]) == 2
    for layer in found["repetition"]["fixed"]:
        assert 0 <= layer["first"] <= layer["any_common"] <= 1
    assert mixtral_routing._pictures(record, tmp_path)["repeated"].stat().st_size > 1000


def text(ids: np.ndarray) -> bytes:
    return bytes(ids[ids < 256].astype(np.uint8))


@pytest.mark.parametrize(("position", "before"), [(0.0, b""), (0.5, b"abcd"), (1.0, b"abcdefgh")])
def test_a_pass_key_stands_where_it_is_said_and_is_asked_for_at_the_end(position: float, before: bytes):
    # 32 ids: an end of text, 8 of real text, the statement " Key <dddd>. " of 13, the question of 10.
    letters = np.frombuffer(b"abcdefghijkl", dtype=np.uint8).astype(np.int64)
    own = passkeys.passkey(letters, 32, position, np.random.default_rng(0), 256)
    key = text(own.key)
    assert len(set(key)) == 4
    assert own.ids[0] == 256
    assert text(own.ids) == before + b" Key <" + key + b">. " + b"abcdefgh"[len(before) :] + b" Key <" + key
    with pytest.raises(ValueError, match="takes 24 ids; 23 were given"):
        passkeys.passkey(letters, 23, position, np.random.default_rng(0), 256)


def test_rows_hold_keys_in_texts_that_grow_and_what_is_left_is_the_text_itself():
    stream = passkeys.PasskeyStream(FixedText().stream(4, 128), 10, 256)
    plain = FixedText().stream(4, 128)
    assert (stream.batch(3) == stream.batch(3)).all()
    assert [stream.longest(step, 128) for step in (0, 5, 10, 99)] == [32, 80, 128, 128]
    # At the start texts have 24 to 32 ids; each states its key and asks for it.
    for row, before in zip(stream.batch(0), plain.batch(0), strict=True):
        starts = np.flatnonzero(row == 256)
        sizes = np.diff(starts)
        assert starts[0] == 0
        assert sizes.min() >= 24
        assert sizes.max() <= 32
        assert text(row).count(b" Key <") == 2 * len(starts)
        # What is left behind the last text, less than 24 ids, is the text as it was.
        assert row[-1] == before[-1]
    late = [np.diff([*np.flatnonzero(row == 256), 128]) for row in stream.batch(50)]
    assert max(sizes.max() for sizes in late) > 64
    assert (stream.batch(50) != stream.batch(51)).any()


def test_the_twin_has_equal_active_flops():
    sparse, dense = (
        count_cost(mixtral_passkey.COURSE.trial(name).make(257)[0], 128) for name in (SPARSE, DENSE)
    )
    # Two layers of three matrices of 64 x (2 x 128).
    assert sparse.flops["experts"] == dense.flops["dense_ffn"] == 2 * 2 * 3 * 64 * 256


def kept_keys(*shares: float | None) -> dict[str, Any]:
    """Return an arm whose cells all have a seed's share, but for one cell that has 0."""
    seeds: list[dict[str, Any]] = []
    for share in shares:
        if share is None:
            seeds.append({"valid_bpb": None})
            continue
        cells = [[share] * 4 for _ in range(5)]
        cells[0][3] = 0.0
        seeds.append({"valid_bpb": 2.0, "retrieved": {"whole": cells, "digits": cells}})
    return {"seeds": seeds}


def test_nine_of_ten_keys_are_asked_of_the_sparse_model_in_every_seed():
    arms = {SPARSE: kept_keys(1.0, 0.98), DENSE: kept_keys(0.5, 1.0)}
    found = mixtral_passkey.passkey_verdict({"arms": arms})
    # 19 of 20 cells: 0.95 x 1.0 and 0.95 x 0.98.
    assert found["sparse"] == pytest.approx([0.95, 0.931])
    assert found["held"]
    assert "worst cell 0 %" in found["sentence"]
    assert "| 0 % | 99 % / 75 % |" in "\n".join(found["table"])
    arms[SPARSE] = kept_keys(1.0, 0.9)
    assert not mixtral_passkey.passkey_verdict({"arms": arms})["held"]
    arms[DENSE] = kept_keys(0.5, None)
    assert mixtral_passkey.passkey_verdict({"arms": arms}) == {
        "held": False,
        "sentence": "did not hold: dense twin diverged",
    }


def test_small_models_are_trained_on_keys_and_asked(fixed: None, tmp_path: Path):
    both = (
        paper_trial(SPARSE, "mixtral", num_experts=4, num_selected=2, expert_width=4, context=32, **SIZES),
        paper_trial(DENSE, "mixtral", moe_layers="none", ffn_width=8, context=32, **SIZES),
    )
    course = Course(
        both, DENSE, steps=2, rows=2, context=32, seeds=(0,), eval_bytes=200, timing_rounds=1, warmup_steps=1
    )
    record = trials.run_course(course, tmp_path, "toy", mixtral_passkey.look, mixtral_passkey.keyed_stream)
    (found,) = record["arms"][SPARSE]["seeds"]
    assert np.asarray(found["retrieved"]["whole"]).shape == (5, 1)
    assert mixtral_passkey.passkey_verdict(record)["sentence"]
    assert mixtral_passkey._pictures(record, tmp_path)["retrieved"].stat().st_size > 1000
