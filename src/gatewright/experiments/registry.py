"""Recorded experiments by name: `gatewright reproduce PAPER/TABLE` rebuilds one and writes its result
file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewright.errors import UserError, did_you_mean
from gatewright.experiments.balance import CLAIM as BALANCE_CLAIM
from gatewright.experiments.balance import run_balance
from gatewright.experiments.bias_balance import CLAIM as BIAS_CLAIM
from gatewright.experiments.bias_balance import run_bias
from gatewright.experiments.deep_figures import COLLAPSE, FACTORED, run_collapse, run_figure2
from gatewright.experiments.deep_table1 import CLAIM as DEEP1_CLAIM
from gatewright.experiments.deep_table1 import run_table1 as run_deep1
from gatewright.experiments.deep_table2 import CLAIM as DEEP2_CLAIM
from gatewright.experiments.deep_table2 import run_table2
from gatewright.experiments.distill_rates import run_distill_rates
from gatewright.experiments.distill_tables import DISTILLED
from gatewright.experiments.few_experts import CLAIM as FEW_CLAIM
from gatewright.experiments.few_experts import run_few
from gatewright.experiments.finetune_tables import TUNED
from gatewright.experiments.gated_tables import GATED
from gatewright.experiments.granularity import GRANULAR
from gatewright.experiments.gshard_quality import CLAIM as GSHARD_CLAIM
from gatewright.experiments.gshard_quality import run_quality
from gatewright.experiments.gshard_rates import run_gshard_rates
from gatewright.experiments.hme_table1 import CLAIM as HME_CLAIM
from gatewright.experiments.hme_table1 import run_hme_table1
from gatewright.experiments.int8_bits import CLAIM as INT8_CLAIM
from gatewright.experiments.int8_bits import run_int8
from gatewright.experiments.interference import CLAIM as INTERFERENCE_CLAIM
from gatewright.experiments.interference import run_interference
from gatewright.experiments.local_ensemble import CLAIM as ENSEMBLE_CLAIM
from gatewright.experiments.local_ensemble import run_ensemble
from gatewright.experiments.local_figures import FIGURES
from gatewright.experiments.local_table1 import CLAIM as TABLE1_CLAIM
from gatewright.experiments.local_table1 import run_table1
from gatewright.experiments.modern import MODERN
from gatewright.experiments.pages import race_page
from gatewright.experiments.quickstart import HOUR, QUICKSTART, RacePlan, run_plan
from gatewright.experiments.rates import CLAIM as RATES_CLAIM
from gatewright.experiments.rates import SWEEPS
from gatewright.experiments.rules_compared import CLAIM as COMPARE_CLAIM
from gatewright.experiments.rules_compared import run_compare
from gatewright.experiments.switch_targets import SWITCH
from gatewright.experiments.translation import CLAIM as TRANSLATION_CLAIM
from gatewright.experiments.translation import run_translation
from gatewright.experiments.tuning_rates import run_text_rates, run_tuning_rates
from gatewright.training.checkpoint import write_atomic

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One experiment: what it claims, and the function (work folder, quick) -> record, page text and
    pictures.
    """

    name: str
    about: str
    run: Callable[[Path, bool], tuple[Record, str, dict[str, Path]]]


@dataclass(frozen=True)
class Reproduction:
    """What `reproduce` wrote: result file, page and pictures."""

    target: str
    quick: bool
    sentence: str
    files: tuple[str, ...]

    def to_dict(self) -> Record:
        """Return plain data for JSON."""
        return {
            "target": self.target,
            "quick": self.quick,
            "result": self.sentence,
            "files": list(self.files),
        }

    def to_text(self) -> str:
        """Return the result in a few lines."""
        return "\n".join([f"{self.target}{' (quick)' if self.quick else ''}: {self.sentence}", *self.files])


def _race_target(plan: RacePlan) -> Target:
    def run(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
        record = run_plan(plan, work, quick)
        slim = {**record, "target": plan.name, "quick": quick, "race": slim_race(record["race"])}
        pictures = {
            axis: work / "race" / f"curve_{axis}.png" for axis in ("tokens", "train_flops", "seconds")
        }
        return slim, race_page(slim), pictures

    return Target(plan.name, plan.claim, run)


TARGETS: dict[str, Target] = {
    **{plan.name: _race_target(plan) for plan in (QUICKSTART, HOUR)},
    "race/int8": Target("race/int8", INT8_CLAIM, run_int8),
    "switch/balance": Target("switch/balance", BALANCE_CLAIM, run_balance),
    "switch/appendix-d": Target("switch/appendix-d", FEW_CLAIM, run_few),
    "deepseek_v3/bias": Target("deepseek_v3/bias", BIAS_CLAIM, run_bias),
    "routers/compare": Target("routers/compare", COMPARE_CLAIM, run_compare),
    "local_experts/table1": Target("local_experts/table1", TABLE1_CLAIM, run_table1),
    "hme/table1": Target("hme/table1", HME_CLAIM, run_hme_table1),
    "local_experts/ensemble": Target("local_experts/ensemble", ENSEMBLE_CLAIM, run_ensemble),
    "local_experts/interference": Target("local_experts/interference", INTERFERENCE_CLAIM, run_interference),
    "deep_moe/table1": Target("deep_moe/table1", DEEP1_CLAIM, run_deep1),
    "deep_moe/figure2": Target("deep_moe/figure2", FACTORED, run_figure2),
    "deep_moe/collapse": Target("deep_moe/collapse", COLLAPSE, run_collapse),
    "sparsely_gated/translation": Target("sparsely_gated/translation", TRANSLATION_CLAIM, run_translation),
    "gshard/quality": Target("gshard/quality", GSHARD_CLAIM, run_quality),
    "gshard/rates": Target("gshard/rates", RATES_CLAIM, run_gshard_rates),
    "switch/distill-rates": Target("switch/distill-rates", RATES_CLAIM, run_distill_rates),
    "switch/text-rates": Target("switch/text-rates", RATES_CLAIM, run_text_rates),
    "switch/tuning-rates": Target("switch/tuning-rates", RATES_CLAIM, run_tuning_rates),
    "deep_moe/table2": Target("deep_moe/table2", DEEP2_CLAIM, run_table2),
    **{
        name: Target(name, claim, run)
        for name, (claim, run) in {
            **FIGURES,
            **GATED,
            **DISTILLED,
            **TUNED,
            **GRANULAR,
            **MODERN,
            **SWITCH,
            **SWEEPS,
        }.items()
    },
}


def reproduce(
    target: str, quick: bool = False, out: Path = Path("reproductions"), work: Path | None = None
) -> Reproduction:
    """Run one experiment and write OUT/NAME.json, NAME.md and pictures; a stopped one goes on where it was.

    Args: `quick` takes minutes and writes NAME-quick.*; the full form is what is recorded. `work` holds runs
    and checkpoints (default runs/reproduce/NAME).
    Raises: UserError for an unknown target.
    """
    if target not in TARGETS:
        raise UserError(
            f"reproduction {target!r} is unknown{did_you_mean(target, TARGETS)}; allowed: "
            f"{', '.join(TARGETS)}"
        )
    name = target.replace("/", "-") + ("-quick" if quick else "")
    record, page, pictures = TARGETS[target].run(work or Path("runs/reproduce") / name, quick)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_atomic(out / f"{name}.md", page)
    files = [out / f"{name}.json", out / f"{name}.md"]
    for axis, picture in pictures.items():
        if picture.exists():
            files.append(out / f"{name}-{axis}.png")
            shutil.copyfile(picture, files[-1])
    verdict = record["race"]["verdict"] if "race" in record else record["verdict"]
    return Reproduction(target, quick, verdict["sentence"], tuple(str(f) for f in files))


def slim_race(race: Record) -> Record:
    """Return a race's record without what only its report needs: per-step logs, loads and coloured texts."""
    large = ("train_log", "load_over_time", "dropped_over_time", "token_view")
    runs = [
        {**one, "sides": [{k: v for k, v in side.items() if k not in large} for side in one["sides"]]}
        for one in race["runs"]
    ]
    return {**race, "runs": runs}
