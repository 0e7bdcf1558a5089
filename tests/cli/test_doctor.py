"""The doctor says what is there, what is missing, and fails only where gatewright does not work."""

from __future__ import annotations

import json

import pytest
import torch

from gatewright import doctor as room
from gatewright.cli import main
from gatewright.doctor import Check, Diagnosis, doctor
from gatewright.kernels import reference


def found(name: str) -> Check:
    (check,) = [check for check in doctor().checks if check.name == name]
    return check


@pytest.fixture(autouse=True)
def no_corpus_scan(monkeypatch):
    """Listing the corpus packages takes a second and is the data room's own test."""
    monkeypatch.setattr(
        "gatewright.data.sources.default_sources", lambda: ([], ["domain drama skipped: not here"])
    )


def test_this_installation_is_ready(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {check["name"] for check in report["checks"]}
    assert report["ok"] is True
    assert {"python", "torch", "processor", "threads", "memory", "cache folder", "self-test"} <= names
    assert [check for check in report["checks"] if check["state"] == "fail"] == []


def test_text_ends_with_the_verdict(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Ready."
    assert any(line.startswith("note  default corpus") and "drama" in line for line in lines)


def test_a_backend_that_computes_something_else_fails(monkeypatch, capsys):
    honest = reference.expert_mlp
    monkeypatch.setattr(reference, "expert_mlp", lambda *args: honest(*args) * 1.001)
    assert found("self-test").state == "fail"
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "Not ready: self-test."


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken() -> list[Check]:
        raise OSError("no such device")

    monkeypatch.setattr(room, "_devices", broken)
    broken.__name__ = "_devices"
    assert found("devices") == Check("devices", "OSError: no such device", "fail")


def test_an_old_torch_fails(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert found("torch").state == "fail"


def test_a_cache_that_cannot_be_written_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    assert found("cache folder").state == "ok"
    assert not (tmp_path / "cache").exists()

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(room.tempfile, "NamedTemporaryFile", refuse)
    check = found("cache folder")
    assert check.state == "fail"
    assert "GATEWRIGHT_CACHE" in check.advice


def test_little_memory_and_disk_are_notes(monkeypatch):
    monkeypatch.setattr(room, "MEMORY_NEEDED_GB", 1e6)
    monkeypatch.setattr(room, "DISK_NEEDED_GB", 1e6)
    diagnosis = doctor()
    states = {check.name: check.state for check in diagnosis.checks}
    assert states["memory"] == states["disk here"] == "note"
    assert diagnosis.ok


def test_to_text_puts_advice_below_its_check():
    text = Diagnosis((Check("a", "1"), Check("bcd", "2", "note", "do this"))).to_text()
    assert text.splitlines() == ["ok    a    1", "note  bcd  2", "           do this", "Ready."]


def test_unknown_flag_is_one_line(capsys):
    assert main(["doctor", "--jsno"]) == 2
    assert "did you mean '--json'?" in capsys.readouterr().err
