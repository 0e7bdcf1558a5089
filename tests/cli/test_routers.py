"""`gatewright routers`: the whole table, one line, and a name that nobody has."""

from __future__ import annotations

import json

import pytest

from gatewright.cli import main
from gatewright.parts import all_routers


def test_every_router_is_in_the_table(capsys: pytest.CaptureFixture[str]):
    assert main(["routers"]) == 0
    text = capsys.readouterr().out
    names = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert names[:-1] == [info.name for info in all_routers()]
    assert names[-1].startswith(f"{len(all_routers())} routers")


def test_one_router_says_all_that_is_known_of_it(capsys: pytest.CaptureFixture[str]):
    assert main(["routers", "expert_choice", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["routers"]
    assert record["causal"] is False
    assert record["causal_in_eval"] is False
    assert main(["routers", "sinkhorn"]) == 0
    assert "causal in evaluation only" in capsys.readouterr().out


def test_an_unknown_name_gets_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["routers", "sinkhron"]) == 2
    error = capsys.readouterr().err
    assert "router 'sinkhron' is unknown; did you mean 'sinkhorn'?" in error
    assert len(error.strip().splitlines()) == 1
