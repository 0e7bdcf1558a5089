"""Text, its corpus and a server of forked runs, made once for all training tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gatewright.data import Corpus, open_corpus
from tests.training.runs import write_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the session: text/ and cache/."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="session")
def data(shared: Path) -> list[str]:
    """Two small domains."""
    return write_text(shared / "text")


@pytest.fixture(autouse=True)
def cache(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep built corpora out of the user's own cache."""
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(shared / "cache"))
    return shared / "cache"


@pytest.fixture(scope="session")
def corpus(data: list[str], shared: Path) -> Corpus:
    """The two domains as bytes."""
    return open_corpus(data, cache=shared / "cache")


@pytest.fixture(scope="session")
def server(shared: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Call with argv and what tests/training/server.py takes; returns how the command ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.server", str(shared / "server")],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    given, replies = process.stdin, process.stdout
    assert replies.readline() == "ready\n"

    def call(argv: list[str], **request: Any) -> dict[str, Any]:
        request |= {"argv": argv, "cache": str(shared / "cache")}
        given.write(json.dumps(request) + "\n")
        given.flush()
        reply: dict[str, Any] = json.loads(replies.readline())
        return reply

    yield call
    process.kill()
    given.close()
    replies.close()
    process.wait()
