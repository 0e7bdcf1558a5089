"""The experiments of the Switch Transformer that compare arms, by target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gatewright.experiments import (
    switch_drops,
    switch_figure1,
    switch_slots,
    switch_table1,
    switch_table2,
    switch_table3,
)
from gatewright.experiments.lab import Record

Result = tuple[Record, str, dict[str, Path]]
SWITCH: dict[str, tuple[str, Callable[[Path, bool], Result]]] = {
    "switch/table1": (switch_table1.CLAIM, switch_table1.run_switch_table1),
    "switch/table3": (switch_table3.CLAIM, switch_table3.run_switch_table3),
    "switch/table2": (switch_table2.CLAIM, switch_table2.run_switch_table2),
    "switch/drops": (switch_drops.CLAIM, switch_drops.run_switch_drops),
    "switch/figure1": (switch_figure1.CLAIM, switch_figure1.run_switch_figure1),
    "switch/slots": (switch_slots.CLAIM, switch_slots.run_slots),
}
