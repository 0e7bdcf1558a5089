"""Every number of every setting: what cannot be is refused in one line that names it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from gatewright.cli import main
from gatewright.papers import get_paper, text_papers
from gatewright.training import TrainRun, loop

PREFIX = "gatewright: error: "


class Accepted(Exception):
    """The settings were taken: the text would be read next."""


@pytest.fixture
def only_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepted(*_: Any) -> None:
        raise Accepted

    monkeypatch.setattr(loop, "prepare", accepted)


def numeric(owner: type) -> list[str]:
    """Return the fields that take a number, alone or in a row."""
    found = []
    hints = get_type_hints(owner)
    for field in dataclasses.fields(owner):
        hint = hints[field.name]
        kinds = {kind for part in (hint, *get_args(hint)) for kind in (part, *get_args(part))}
        if kinds & {int, float} and bool not in kinds:
            found.append(field.name)
    return found


# Where nothing is a setting of its own: off, none of it, or torch's choice. Elsewhere 0 is refused.
ZERO = {"data_seed", "seed", "warmup_steps", "decay_share", "final_rate", "weight_decay", "beta1", "beta2"}
ZERO |= {"adam_eps", "clip", "ema", "threads", "balance_weight", "z_weight", "device_weight", "bias_rate"}
ZERO |= {"communication_weight", "future_tokens", "future_weight", "num_shared_experts"}
ZERO |= {"lstm_width", "dropout", "expert_dropout", "importance_weight", "load_weight"}
# Not looked at while the layers are sparse.
UNUSED = {"ffn_width", "ffn_depth"}


@pytest.mark.usefixtures("only_settings")
@pytest.mark.parametrize("paper", text_papers())
def test_every_number_is_checked(paper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = 0
    out = ["--out", str(tmp_path / "out"), "--data", "unread"]
    for owner in (TrainRun, get_paper(paper).Settings):
        for name in numeric(owner):
            if name in UNUSED or (owner is TrainRun and paper != "mixtral"):
                continue
            flag = f"--{name.replace('_', '-')}"
            for value in (
                "-1",
                "0",
                "nan",
                "inf",
                "1e400",
                "many",
                "1_0_",
                "",
                "0x",
                "1000000000000",
                str(10**40),
            ):
                if (name, value) == ("num_layers", "1000000000000"):
                    continue
                given += 1
                code = main(["train", paper, *out, flag, value])
                stdout, stderr = capsys.readouterr()
                assert stdout == ""
                assert stderr.startswith(PREFIX)
                assert stderr.count("\n") == 1
                what = f"{flag} {value}: {stderr}"
                if value in ("nan", "inf", "1e400", "many", "1_0_", "", "0x", "-1"):
                    assert code == 2, what
                    assert name in stderr or flag in stderr, what
                elif value == "0" and name not in ZERO:
                    assert code == 2, what
                else:
                    # Taken, or refused in words; nothing in between.
                    assert code == 2 or "Accepted" in stderr, what
    assert given > 100
    assert not (tmp_path / "out").exists()
