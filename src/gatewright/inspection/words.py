"""Numbers as people read them, and text made safe for HTML."""

from __future__ import annotations

import html
from datetime import datetime
from typing import Any

NONE = "not recorded"
TIE = "\N{NO-BREAK SPACE}"  # keeps a number and its unit on one line


def escape(value: Any) -> str:
    """Return text that HTML shows as it is, inside an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def scaled(value: float | None, suffixes: str = " KMBT", none: str = NONE) -> str:
    """Return three significant digits with a magnitude: 1234567 -> "1.23 M"."""
    if value is None:
        return none
    if abs(value) < 999.5:
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
    power = 0
    while abs(value) >= 999.5 and power < len(suffixes) - 1:
        value /= 1000
        power += 1
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}{TIE}{suffixes[power]}"


def tick(value: float) -> str:
    """Return an axis label without needless zeros: 2000000 -> "2 M"."""
    number, _, unit = scaled(value, " KMGTPEZY").partition(TIE)
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number}{TIE}{unit}" if unit else number


def flops(value: float | None) -> str:
    """Return floating-point operations with an SI prefix: 3.2e12 -> "3.20 TFLOP"."""
    if value is None:
        return NONE
    shown = scaled(value, " KMGTPEZY")
    return shown + ("FLOP" if TIE in shown else f"{TIE}FLOP")


def seconds(value: float | None) -> str:
    """Return a duration: 83 -> "83 s", 754 -> "12 min 34 s", 4000 -> "1 h 06 min"."""
    if value is None:
        return NONE
    if value < 10:
        return f"{value:.1f}{TIE}s"
    whole = round(value)
    if whole < 120:
        return f"{whole}{TIE}s"
    if whole < 3600:
        return f"{whole // 60}{TIE}min {whole % 60:02d}{TIE}s"
    return f"{whole // 3600}{TIE}h {whole % 3600 // 60:02d}{TIE}min"


def bits(value: float | None) -> str:
    """Return bits per byte with four decimals."""
    return NONE if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """Return a difference in bits per byte with its sign: +0.0123 or −0.0123."""
    return NONE if value is None else f"{value:+.4f}".replace("-", "−")


def percent(value: float | None, digits: int | None = None) -> str:
    """Return a share as percent; without `digits`, as many as two or three significant figures need."""
    if value is None:
        return NONE
    shown = 100 * value
    if digits is None:
        whole = abs(shown) >= 100 or not shown or (abs(shown) >= 1 and abs(shown - round(shown)) < 0.05)
        digits = 0 if whole else 1 if abs(shown) >= 1 else 2
    return f"{shown:.{digits}f}{TIE}%"


def times(value: float | None, none: str = "not reached") -> str:
    """Return a ratio: 1.384 -> "1.38×"."""
    return none if value is None else f"{value:.2f}×"


def rate(value: float | None) -> str:
    """Return a learning rate in short form."""
    return NONE if value is None else f"{value:.3g}"


def moment(stamp: str) -> str:
    """Return an ISO 8601 time in short form, "2000-01-01 00:00 UTC"; any other text as it is."""
    try:
        when = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


def plural(count: int, word: str) -> str:
    """Return a count with its noun: 1 seed, 3 seeds."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
