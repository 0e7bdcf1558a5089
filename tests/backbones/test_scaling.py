"""Stretched rotary positions against transformers' own functions, and worked by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from gatewright.backbones import RopeScaling, RotaryPositions
from gatewright.backbones.attention import rotate, turn_pair
from gatewright.errors import UserError

CPU = torch.device("cpu")


def random_case(kind: str, draw: random.Random) -> tuple[dict[str, Any], RopeScaling]:
    """Return rope_parameters as transformers has them, and the same as ours."""
    factor, original = draw.choice([1.0, 2.0, 7.5, 40.0]), draw.choice([16, 128, 4096])
    theirs: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        theirs["original_max_position_embeddings"] = original
    if kind == "llama3":
        low = draw.choice([1.0, 1.5])
        theirs |= {"low_freq_factor": low, "high_freq_factor": low * draw.choice([1.0, 4.0])}
    if kind == "yarn":
        theirs |= {"beta_fast": draw.choice([32.0, 20.0]), "beta_slow": draw.choice([1.0, 2.0])}
        theirs |= {"truncate": draw.random() < 0.5}
        if draw.random() < 0.6:
            theirs |= {"mscale": draw.choice([0.707, 1.0]), "mscale_all_dim": draw.choice([0.0, 0.707, 1.0])}
        if draw.random() < 0.2:
            theirs["attention_factor"] = 1.3
    names = {
        "original_max_position_embeddings": "original",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
    }
    ours = {names.get(name, name): value for name, value in theirs.items() if name != "rope_type"}
    return theirs, RopeScaling(kind, **ours)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_frequencies_are_those_of_transformers(kind: str):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    draw = random.Random(kind)
    for _ in range(60):
        theirs, ours = random_case(kind, draw)
        dim, theta = draw.choice([4, 16, 64]), draw.choice([1e4, 150_000.0])
        theirs["rope_theta"] = theta
        length = draw.choice([8, 200, 5000])
        config = transformers.LlamaConfig(
            hidden_size=2 * dim,
            num_attention_heads=2,
            max_position_embeddings=theirs.get("original_max_position_embeddings", 64),
            rope_parameters=theirs,
        )
        expected, factor = functions[kind](config, CPU, seq_len=length)
        found = ours.frequencies(theta, dim, length, CPU)
        torch.testing.assert_close(found.float(), expected, rtol=2e-6, atol=0.0)
        assert ours.magnitude == pytest.approx(factor, rel=1e-12)
        assert RopeScaling.parse(str(ours)) == ours


def test_yarn_by_hand():
    # theta 100, 4 numbers: frequencies 1 and 0.1. In 2 pi x 16 tokens they turn 16 and 1.6 times. Coordinate
    # of b turns: 4 ln(16 / b) / (2 ln 100): 0 for 16 turns, 1.204 for 1, so the blend goes from 0 to 1.204.
    scaling = RopeScaling("yarn", 4.0, round(32 * math.pi), beta_fast=16.0, truncate=False)
    plain, slow = scaling.frequencies(100.0, 4, 1, CPU).tolist()
    share = 1 / (4 * math.log(round(32 * math.pi) / (2 * math.pi)) / (2 * math.log(100)))
    assert plain == pytest.approx(1.0, rel=1e-2)
    assert slow == pytest.approx(0.1 * (share / 4 + 1 - share), rel=1e-2)
    assert scaling.magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_deepseek_scales_its_scores_and_not_its_angles():
    scaling = RopeScaling.parse("yarn:factor=40,original=4096,mscale=1,mscale_all_dim=1")
    assert scaling.magnitude == 1
    assert scaling.score_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    # V2 section 3.1.4: sqrt(t) = 0.0707 ln s + 1.
    v2 = RopeScaling.parse("yarn:factor=40,original=4096,mscale=0.707,mscale_all_dim=0.707")
    assert math.sqrt(v2.score_factor) == pytest.approx(0.0707 * math.log(40) + 1)


def test_dynamic_positions_follow_the_length_at_hand():
    rotary = RotaryPositions(8, 100.0, "dynamic:factor=4,original=16")
    short, long = rotary.tables(0, 16, CPU, torch.float64), rotary.tables(0, 32, CPU, torch.float64)
    for one, plain in zip(short, RotaryPositions(8, 100.0).angles(0, 16, CPU), strict=True):
        assert torch.equal(one, plain)
    assert not torch.allclose(long[0][:16], short[0])
    # Tables of a longer text are not taken for a shorter one.
    assert torch.equal(rotary.tables(0, 16, CPU, torch.float64)[0], short[0])


def test_tables_carry_the_magnitude():
    scaling = RopeScaling("yarn", 4.0, 16)
    cos, sin = RotaryPositions(8, 100.0, scaling).tables(0, 3, CPU, torch.float64)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, scaling.magnitude**2))


def test_interleaved_pairs_are_complex_numbers_side_by_side():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(1, 1, 5, 8, dtype=torch.float64)
    cos, sin = RotaryPositions(8, 100.0).angles(3, 5, CPU)
    turned_q, turned_k = turn_pair(q, k, cos, sin, interleaved=True)
    angle = torch.complex(cos[:, :4], sin[:, :4])
    for x, turned in ((q, turned_q), (k, turned_k)):
        expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * angle
        torch.testing.assert_close(torch.complex(turned[..., :4], turned[..., 4:]), expected)
    # Scores are those of pairs that stay side by side.
    beside = [torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * angle) for x in (q, k)]
    expected = beside[0].flatten(-2) @ beside[1].flatten(-2).transpose(-1, -2)
    torch.testing.assert_close(turned_q @ turned_k.transpose(-1, -2), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_numbers_beyond_the_rotary_ones_stay(interleaved: bool):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 5, 10), torch.randn(2, 1, 5, 10)
    cos, sin = RotaryPositions(4).tables(0, 5, CPU, torch.float32)
    for x, turned in zip((q, k), turn_pair(q, k, cos, sin, interleaved), strict=True):
        assert torch.equal(turned[..., 4:], x[..., 4:])
        first = torch.cat([x[..., :4:2], x[..., 1:4:2]], -1) if interleaved else x[..., :4]
        torch.testing.assert_close(turned[..., :4], rotate(first, cos, sin))
    with pytest.raises(UserError, match="12 rotary numbers in heads of 10"):
        turn_pair(q, k, *RotaryPositions(12).tables(0, 5, CPU, torch.float32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yearn", "did you mean 'yarn'"),
        ("yarn:factor=4", "lacks original; allowed: yarn:factor=NUMBER,original=NUMBER"),
        ("yarn:factor=4,original=16,mscal=1", "did you mean 'mscale'"),
        ("yarn:factor=4,original=16,beta_fast=1", "beta_slow 1.0, beta_fast 1.0"),
        ("yarn:factor=four,original=16", "factor=NUMBER"),
        ("linear:factor=0.5", "a factor of 1 or more"),
        ("linear:factor=nan", "a factor of 1 or more"),
        ("dynamic:factor=2,original=0", "original 0"),
        ("llama3:factor=2,original=16,low=4,high=1", "0 < low <= high"),
        ("none:factor=2", "'factor' is unknown"),
    ],
)
def test_mistakes_are_one_line(text: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        RopeScaling.parse(text)
    assert "\n" not in str(caught.value)


def test_a_head_too_small_for_its_scaling_is_refused():
    with pytest.raises(UserError, match="dynamic with head_dim 2"):
        RotaryPositions(2, 1e4, "dynamic:factor=2,original=16")
