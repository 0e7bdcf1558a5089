"""Settings as tables of a TOML file: what is read back is what was written, a None beside a number too."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from gatewright.errors import UserError
from gatewright.evaluation.plan import plan
from gatewright.papers import get_trained_paper, trained_papers
from gatewright.papers.settings_table import settings_of, table_of
from gatewright.training.run import TrainRun
from gatewright.training.settings_file import check_same_settings, write_settings

Switch = get_trained_paper("switch").Settings


@pytest.mark.parametrize("name", trained_papers())
def test_every_paper_s_defaults_come_back(name: str) -> None:
    settings = get_trained_paper(name).Settings()
    assert settings_of(type(settings), table_of(settings)) == settings


def test_a_none_beside_a_number_is_written_and_read(tmp_path: Path) -> None:
    settings = dataclasses.replace(Switch(), capacity_factor=None)
    run = TrainRun(paper="switch", out=str(tmp_path), model=settings)
    path = tmp_path / "run.toml"
    write_settings(path, run, settings)
    assert 'capacity_factor = "none"' in path.read_text(encoding="utf-8")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    assert settings_of(Switch, tables["model"]) == settings
    check_same_settings(path, run, settings)
    with pytest.raises(UserError, match=r"^capacity_factor is 1.25 but .* begun with none"):
        check_same_settings(path, run, Switch())
    assert plan(str(path)).settings["capacity_factor"] is None
