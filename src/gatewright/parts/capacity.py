"""How many places an expert has, and whose choices get them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from jaxtyping import Int64
from torch import Tensor

from gatewright.errors import UserError, did_you_mean

Order = Literal["position", "rank", "batch_priority"]
ORDERS: tuple[Order, ...] = ("position", "rank", "batch_priority")


def check_factor(capacity_factor: float) -> None:
    """Raise UserError unless the factor is a finite number above 0."""
    if not (capacity_factor > 0 and math.isfinite(capacity_factor)):
        raise UserError(
            f"capacity_factor {capacity_factor}; allowed: above 0, or none for dropless; 1.0 has no head-room"
        )


def expert_capacity(capacity_factor: float, num_selected: int, num_tokens: int, num_experts: int) -> int:
    """Return C = ceil(f K T / E), the places of each expert for T tokens.

    Differs: Switch Transformer eq 3 and ST-MoE omit K (for K = 1 the two agree).
    """
    check_factor(capacity_factor)
    over, under = _exactly(capacity_factor)
    return _ceil(over * num_selected * num_tokens, under * num_experts)


@dataclass(frozen=True)
class Capacity:
    """The places of each expert in a routing group of T tokens: C = ceil(f K T / E), and who gets them.

    `factor` f in training, `eval_factor` in evaluation (None: the same; math.inf: dropless). `minimum` is
    the least C. `multiple` rounds C up to a multiple (V-MoE's code: 4). `per_token` True takes K as 1, the
    convention of Switch, ST-MoE and Mesh-TensorFlow, C = ceil(f T / E). `order`, within a group: "position"
    token by token and inside a token by rank; "rank" all first choices before any second (GShard);
    "batch_priority" as "rank", tokens in falling order of their highest weight (V-MoE). `reroute` gives a
    choice that found no room to the token's next best expert that has some (no-token-left-behind, Switch
    appendix B). Only "position" without `reroute` is causal: a later token's choice never takes the place of
    an earlier one's (for K = 1, "rank" is the same).
    Raises: UserError for what no layer can have.
    """

    factor: float
    eval_factor: float | None = None
    minimum: int = 0
    multiple: int = 1
    per_token: bool = False
    order: Order = "position"
    reroute: bool = False
    # The factors as fractions: compiled code cannot read a decimal.
    _exact: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_factor(self.factor)
        if self.eval_factor is not None and not self.eval_factor > 0:
            raise UserError(f"eval_factor {self.eval_factor}; allowed: above 0, or inf for dropless")
        if self.minimum < 0 or self.multiple < 1:
            raise UserError(
                f"minimum {self.minimum}, multiple {self.multiple}; allowed: a minimum of 0 or more, a "
                "multiple of 1 or more"
            )
        if self.order not in ORDERS:
            raise UserError(
                f"order {self.order!r} is unknown{did_you_mean(self.order, ORDERS)}; allowed: "
                f"{', '.join(ORDERS)}"
            )
        exact = (
            _exactly(self.factor),
            _exactly(self.factor if self.eval_factor is None else self.eval_factor),
        )
        object.__setattr__(self, "_exact", exact)

    def with_factor(self, factor: float) -> Capacity:
        """Return the same with another factor, in training and evaluation alike."""
        return replace(self, factor=factor, eval_factor=None)

    def factor_in(self, training: bool) -> float | None:
        """Return the factor that holds, None where evaluation is dropless."""
        factor = self.factor if training or self.eval_factor is None else self.eval_factor
        return None if math.isinf(factor) else factor

    def _share(self, num_selected: int, num_experts: int, training: bool) -> tuple[int, int]:
        """Return the numerator and the denominator of f K / E, whole numbers."""
        over, under = self._exact[0 if training else 1]
        return over * (1 if self.per_token else num_selected), under * num_experts

    def places(self, num_selected: int, num_tokens: int, num_experts: int, training: bool) -> int:
        """Return C for one group of T tokens; not asked where `factor_in` is None."""
        over, under = self._share(num_selected, num_experts, training)
        held = max(min(_ceil(over * num_tokens, under), _MOST**2), self.minimum)
        return _ceil(held, self.multiple) * self.multiple

    def places_of_groups(
        self, num_selected: int, tokens: Int64[Tensor, "G"], num_experts: int, training: bool
    ) -> Int64[Tensor, "G"]:
        """Return C [G] int64 for groups of `tokens` [G] real tokens, without looking at the numbers."""
        over, under = self._share(num_selected, num_experts, training)
        whole, (over, under) = over // under, _next_above(over % under, under, _MOST)
        # Whole numbers up to here, so no product leaves int64.
        held = tokens * min(whole, _MOST) + (tokens * over + under - 1) // under
        held = held.clamp(min=self.minimum)
        return (held + self.multiple - 1) // self.multiple * self.multiple


# No group has more tokens.
_MOST = 2**30


def _ceil(over: int, under: int) -> int:
    return -(-over // under)


def _exactly(factor: float) -> tuple[int, int]:
    """Return the decimal number that was written, as a fraction: in floats 1.1 * 50 is more than 55. No
    group has more than the number that stands for infinity.
    """
    return (_MOST, 1) if math.isinf(factor) else Fraction(str(factor)).as_integer_ratio()


def _next_above(over: int, under: int, most: int) -> tuple[int, int]:
    """Return the least fraction >= over / under (which is < 1) whose denominator is at most `most`.

    ceil(n over / under) is the same for both up to n = most: the smallest m with m / n above is asked for.
    """
    if under <= most or over == 0:
        return over, under
    a, b, c, d = 0, 1, 1, 1  # a / b < over / under <= c / d, neighbours of the Stern-Brocot tree
    while b + d <= most and c * under != over * d:
        below, above = over * b - under * a, under * c - over * d
        steps = min((below - 1) // above, (most - b) // d)
        a, b = a + steps * c, b + steps * d
        below = over * b - under * a
        steps = min(above // below, (most - d) // b)
        c, d = c + steps * a, d + steps * b
    return c, d
