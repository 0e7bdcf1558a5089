"""What a loss is off by: constant factors, the libraries that have them, and known mistakes of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gatewright.testing.balance_cases import Batch, slow_value
from gatewright.testing.report import near
from gatewright.testing.slow_losses import LOSSES, Setting

Factor = Callable[..., float]

# By E experts, K of them per token, T tokens, L layers.
FACTORS: dict[str, Factor] = {
    "1": lambda **_: 1.0,
    "K": lambda K, **_: K,
    "1 / K": lambda K, **_: 1 / K,
    "E": lambda E, **_: E,
    "1 / E": lambda E, **_: 1 / E,
    "E^2": lambda E, **_: E**2,
    "1 / E^2": lambda E, **_: 1 / E**2,
    "K / E": lambda E, K, **_: K / E,
    "E / K": lambda E, K, **_: E / K,
    "K / E^2": lambda E, K, **_: K / E**2,
    "T": lambda T, **_: T,
    "1 / T": lambda T, **_: 1 / T,
    "L": lambda L, **_: L,
    "K L": lambda K, L, **_: K * L,
    "E / (E - 1)": lambda E, **_: E / max(E - 1, 1),
}
# Convention -> loss -> the factor that it has where ours has 1.
CONVENTIONS: dict[str, dict[str, str]] = {
    "sum_to_k": {"balance": "K", "sequence_balance": "K"},
    "transformers": {"balance": "K"},
    "flaxformer": {"balance": "K"},
    "gshard_printed": {"gshard": "1 / E^2"},
    "fairscale": {"gshard": "1 / E^2"},
    "summed_over_layers": dict.fromkeys(LOSSES, "L"),
    "unbiased_variance": {"importance": "E / (E - 1)", "load": "E / (E - 1)"},
}
_TOLD = {
    ("balance", "K"): "f sums to K, as in transformers and flaxformer",
    ("sequence_balance", "K"): "f sums to K",
    ("balance", "K L"): "f sums to K, and layers are added",
    ("balance", "1 / K"): "f is divided by K twice",
    ("balance", "1 / E"): "the factor E is missing",
    ("balance", "1 / E^2"): "mean over experts in place of E times the sum",
    ("gshard", "1 / E^2"): "GShard as printed, as in fairscale",
    ("importance", "E / (E - 1)"): "the unbiased variance, as in Tutel",
    ("load", "E / (E - 1)"): "the unbiased variance, as in Tutel",
}


def factor_of(factor: Factor, batch: Batch) -> float:
    """Return a factor's value for one batch."""
    facts: dict[str, Any] = dict(batch.facts)
    if batch.mask is not None:
        facts["T"] = int(batch.mask.sum())
    return float(factor(**facts))


def _mistakes(loss: str, setting: Setting) -> dict[str, Setting]:
    """Return the definition and what is made of it by mistake."""
    told = {
        "": setting,
        "layers are pooled before the product: their imbalances cancel": replace(setting, pooled=True),
    }
    if loss == "z":
        told["it is computed from probabilities, not from logits"] = replace(setting, twice=True)
    elif loss != "load":
        told["P is a softmax of scores, not of logits"] = replace(setting, twice=True)
    if loss in ("balance", "device", "sequence_balance"):
        told["f counts first choices only"] = replace(setting, first_only=True)
    if loss not in ("z", "importance"):
        told["f counts the highest logits, not the choices that were made"] = replace(
            setting, choose_again=True
        )
    return told | {
        "; and ".join(filter(None, (what, "padding is counted"))): replace(mistake, padding=True)
        for what, mistake in told.items()
    }


def explained(loss: str, found: list[tuple[Batch, float]], setting: Setting, tolerance: float) -> list[str]:
    """Return what makes every value the one that was found: a factor, a mistake, or both.

    What needs fewer mistakes stands first; others that would say the same are not looked for.
    """
    for what, mistake in _mistakes(loss, setting).items():
        left, ratio = list(FACTORS), math.nan
        for batch, value in found:
            slow = _slow(loss, batch, mistake)
            left = [name for name in left if near(value, factor_of(FACTORS[name], batch) * slow, tolerance)]
            ratio = value / slow if slow and math.isnan(ratio) else ratio
            if not near(value, (0 if math.isnan(ratio) else ratio) * slow, 10 * tolerance):
                ratio = math.inf
            if not left and math.isinf(ratio):
                break
        else:
            return [_words(loss, what, left[0] if left else f"{ratio:.9g}")]
    return []


def _slow(loss: str, batch: Batch, setting: Setting) -> float:
    named = {name: batch.options[name] for name in ("num_devices", "devices_kept") if name in batch.options}
    return slow_value(loss, batch, replace(setting, **named)).item()


def _words(loss: str, what: str, factor: str) -> str:
    if factor == "1":
        return what or "every value is the defining one: it has the factor 1"
    known = [name for name, losses in CONVENTIONS.items() if losses.get(loss) == factor]
    told = f"every value is {factor} times the defining one"
    if (loss, factor) in _TOLD:
        told += f": {_TOLD[loss, factor]}"
    if known:
        told += f" (convention={known[0]!r})"
    return f"{what}; {told}" if what else told
