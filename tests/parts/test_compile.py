"""torch.compile(fullgraph=True) and torch.export of whole layers, against eager mode."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatewright.kernels import choose_backend, native

ROOT = Path(__file__).resolve().parents[2]


def differences(*words: str) -> dict[str, str]:
    """Return what the program prints; it runs without this test run's shape checks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parts.compiled_experts", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_kind_of_expert_compiles_whole_and_equals_eager_mode():
    assert {name: text for name, text in differences().items() if text} == {}


def test_an_export_of_any_length_saved_and_loaded_equals_eager_mode():
    assert {name: text for name, text in differences("export").items() if text} == {}


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)
def test_machine_code_equals_eager_mode():
    assert differences("inductor") == {"inductor": ""}


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch):
    usual = "native" if native.is_ready() else "grouped"
    assert choose_backend()[0] == usual
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose_backend()[0] == usual
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    name, reason = choose_backend()
    assert (name, reason) == (
        "padded",
        "an exported program shall run without this toolkit: torch's own operators alone",
    )
    assert choose_backend("grouped") == ("grouped", "asked for by name")
