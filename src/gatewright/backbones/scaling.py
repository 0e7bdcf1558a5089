"""Rotary frequencies for texts longer than those that a model was trained on: linear, NTK, YaRN, Llama 3."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from gatewright.errors import UserError, did_you_mean

# What each kind is told, in the order of their names in transformers' configurations; the rest is optional.
NEEDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original"),
    "yarn": ("factor", "original"),
    "llama3": ("factor", "original", "low", "high"),
}
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of rotary positions are stretched by `factor` beyond a text of `original` tokens.

    "linear" (Chen et al. 2023) divides all of them. "dynamic" (NTK-aware, by the length at hand) raises the
    base instead. "yarn" (Peng et al. 2023, eq 23-25) divides those that turn less than `beta_slow` times in
    the original text, leaves those that turn more than `beta_fast` times, blends between, and scales cos and
    sin; `truncate` rounds the blend's ends to whole coordinates. "llama3" (Llama 3.1's configuration) does so
    by wavelength, between original / `high` and original / `low`. Zero for `mscale`, `mscale_all_dim` and
    `attention_factor` is "not given".
    Raises: UserError for an unknown kind, and for numbers that it cannot work with.
    """

    kind: str = "none"
    factor: float = 1.0
    original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0
    truncate: bool = True
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in NEEDS:
            raise UserError(
                f"rope scaling {self.kind!r} is unknown{did_you_mean(self.kind, NEEDS)}; allowed: "
                f"{', '.join(NEEDS)}"
            )
        numbers = [v for v in vars(self).values() if isinstance(v, float)]
        if not all(math.isfinite(v) and v >= 0 for v in numbers) or not self.factor >= 1:
            raise UserError(
                f"rope scaling {self.kind} with factor {self.factor}; allowed: a factor of 1 or more, and "
                "numbers of 0 or more"
            )
        if "original" in NEEDS[self.kind] and self.original < 1:
            raise UserError(
                f"rope scaling {self.kind} with original {self.original}; allowed: 1 or more, the context "
                "that was trained on before it was stretched"
            )
        if self.kind == "llama3" and not 0 < self.low <= self.high:
            raise UserError(f"rope scaling low {self.low}, high {self.high}; allowed: 0 < low <= high")
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"rope scaling beta_slow {self.beta_slow}, beta_fast {self.beta_fast}; allowed: 0 < slow < "
                "fast"
            )

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """Return what "none" or "yarn:factor=40,original=4096" says: a kind, and its numbers by name.

        Raises: UserError for unknown names and what is no number.
        """
        kind, _, rest = text.partition(":")
        if kind not in NEEDS:
            return cls(kind)  # says what is allowed
        known = [*NEEDS[kind], *(_YARN if kind == "yarn" else ())]
        given: dict[str, Any] = {}
        for word in filter(None, rest.split(",")):
            name, _, value = word.partition("=")
            if name not in known:
                raise UserError(
                    f"rope_scaling {text!r}: {name!r} is unknown{did_you_mean(name, known)}; allowed: "
                    f"{', '.join(known) or 'nothing behind none'}"
                )
            try:
                number = float(value)
                given[name] = int(number) if name == "original" else number
            except (ValueError, OverflowError):
                raise UserError(f"rope_scaling {text!r}: {word!r}; allowed: {name}=NUMBER") from None
        lacking = [name for name in NEEDS[kind] if name not in given]
        if lacking:
            raise UserError(
                f"rope_scaling {text!r} lacks {', '.join(lacking)}; allowed: {kind}:"
                f"{','.join(f'{name}=NUMBER' for name in NEEDS[kind])}"
            )
        if "truncate" in given:
            given["truncate"] = bool(given["truncate"])
        return cls(kind, **given)

    def __str__(self) -> str:
        """Return the text that `parse` takes."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "kind"]
        plain = RopeScaling()
        told = [
            f"{name}={float(getattr(self, name)):.17g}"
            for name in names
            if name in NEEDS[self.kind] or getattr(self, name) != getattr(plain, name)
        ]
        return f"{self.kind}:{','.join(told)}" if told else self.kind

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied with (YaRN's sqrt(1 / t)); 1 for the other kinds."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    @property
    def score_factor(self) -> float:
        """What DeepSeek's attention multiplies its scores with: the square of 0.1 mscale_all_dim ln s + 1."""
        return self._grown(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _grown(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(
        self, theta: float, dim: int, length: int, device: torch.device
    ) -> Float64[Tensor, "half"]:
        """Return the angle per position of each pair of coordinates, [dim / 2] fp64, in a text of `length`.

        Equation: theta ** (-2 i / dim), i = 0 .. dim / 2 - 1, and then as the kind says.
        """
        if self.kind == "dynamic":
            share = max(length, self.original) / self.original
            theta = theta * (self.factor * share - (self.factor - 1)) ** (dim / (dim - 2))
        steps = torch.arange(0, dim, 2, device=device, dtype=torch.float64)
        plain = theta ** (-steps / dim)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "yarn":
            return self._yarn(plain, theta, dim)
        return self._llama3(plain) if self.kind == "llama3" else plain

    def _yarn(self, plain: Tensor, theta: float, dim: int) -> Tensor:
        def coordinate(turns: float) -> float:
            """Where a frequency turns so often in the original text."""
            return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = coordinate(self.beta_fast), coordinate(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        # Both ends at one place would divide by zero.
        width = high - low if high != low else 0.001
        place = torch.arange(plain.shape[0], device=plain.device, dtype=torch.float64)
        stretched = ((place - low) / width).clamp(0, 1)
        return plain / self.factor * stretched + plain * (1 - stretched)

    def _llama3(self, plain: Tensor) -> Tensor:
        turns = self.original * plain / (2 * math.pi)
        if self.high == self.low:
            kept = (turns >= self.low).to(plain.dtype)
        else:
            kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain
