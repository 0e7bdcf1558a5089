"""Numbers in words, and colours that can be read."""

from __future__ import annotations

import itertools

import pytest

from gatewright.inspection import words
from gatewright.inspection.palette import expert_colours
from gatewright.inspection.plots.theme import DARK, LIGHT

TIE = "\N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.scaled(1234567), "1.23_M"),
        (words.scaled(999_700), "1.00_M"),
        (words.scaled(999.7), "1.00_K"),
        (words.scaled(12), "12"),
        (words.scaled(None), "not recorded"),
        (words.scaled(46702792704), "46.7_B"),
        (words.tick(2e6), "2_M"),
        (words.tick(20), "20"),
        (words.flops(3.2e12), "3.20_TFLOP"),
        (words.flops(5), "5_FLOP"),
        (words.seconds(83), "83_s"),
        (words.seconds(754), "12_min 34_s"),
        (words.seconds(4000), "1_h 06_min"),
        (words.signed(-0.0123), "−0.0123"),
        (words.percent(0.8), "80_%"),
        (words.percent(0.0156), "1.6_%"),
        (words.percent(0.0004), "0.04_%"),
        (words.times(None), "not reached"),
        (words.moment("2000-01-02T03:04:05+00:00"), "2000-01-02 03:04 UTC"),
        (words.moment("then"), "then"),
    ],
)
def test_numbers_read_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected.replace("_", TIE)


def luminance(colour: str) -> float:
    """Return the relative luminance of "#rrggbb" (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours (WCAG 2), 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("num_experts", [1, 2, 8, 16, 64, 100])
def test_token_text_is_legible_on_every_expert_colour(num_experts: int) -> None:
    colours = expert_colours(num_experts)
    assert len(colours) == num_experts
    assert min(contrast("#14181d", colour) for colour in colours) >= 4.5  # WCAG AA
    if num_experts <= 64:
        assert len(set(colours)) == num_experts


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_lines_and_labels_stand_out_from_the_paper(theme: type[LIGHT]) -> None:
    for colour in (theme.ink, theme.muted):
        assert contrast(colour, theme.paper) >= 4.5
    for colour in theme.sparse[:2] + theme.dense[:2]:
        assert contrast(colour, theme.paper) >= 3  # WCAG: graphics
    # Hue alone must not carry the difference between shades of one hue.
    for first, second in itertools.pairwise(expert_colours(64)[::8]):
        assert luminance(first) - luminance(second) > 0.02
