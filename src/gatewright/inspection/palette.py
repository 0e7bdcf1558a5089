"""Colours for experts: hue and shade from the id, the same in every layer, legible under dark text."""

from __future__ import annotations

import math

# Eight hues in degrees of OKLCH, chosen apart for red-green and blue-yellow deficiencies, and ordered so that
# neighbours in id differ most. Shades differ in lightness, which every eye tells apart.
HUES = (250.0, 60.0, 165.0, 350.0, 105.0, 300.0, 205.0, 30.0)


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """Return the sRGB colour "#rrggbb" of an OKLCH triple (Ottosson 2020), cut to the gamut."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    channels = []
    for value in linear:
        value = min(max(value, 0.0), 1.0)
        encoded = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
        channels.append(round(255 * encoded))
    return "#{:02x}{:02x}{:02x}".format(*channels)


def expert_colours(num_experts: int) -> list[str]:
    """Return one background colour per expert: hue = id mod 8, shade = id div 8, from light to darker.

    Above 64 experts colours repeat; the number under a token always tells.
    """
    groups = max(1, min(8, -(-num_experts // 8)))
    colours = []
    for expert in range(num_experts):
        depth = (expert // 8 % groups) / max(groups - 1, 1)
        lightness = (0.86 if groups == 1 else 0.93) - 0.26 * depth
        colours.append(oklch(lightness, 0.06 + 0.07 * depth if groups > 1 else 0.1, HUES[expert % 8]))
    return colours
