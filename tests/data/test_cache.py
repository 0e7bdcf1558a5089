"""A cache is whole or absent: damage is noticed and mended, a full disk or a kill leaves no half."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gatewright.data import open_corpus
from gatewright.data.cache import cache_root, cached_folder
from gatewright.errors import RunFailure
from tests.data.samples import prose


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(prose(60_000))
    return path


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def test_the_cache_folder(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("GATEWRIGHT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache/gatewright"
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    assert cache_root(tmp_path / "there") == tmp_path / "there"


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lie(path: Path) -> None:
    about = json.loads(path.read_text())
    about["train_domain_bytes"]["a"] += 1
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("train.npy", flip, "train.npy does not match its checksum"),
        ("train.npy", halve, r"train.npy has \d+ bytes instead of \d+"),
        ("valid-0.npy", Path.unlink, "valid-0.npy cannot be read"),
        ("tokenizer.json", flip, "tokenizer.json does not match its checksum"),
        ("manifest.json", lie, "manifest.json does not match its own checksum"),
        ("manifest.json", halve, "manifest.json cannot be read"),
        ("manifest.json", Path.unlink, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_cache_is_built_again(tmp_path: Path, text: Path, name: str, damage, said: str):
    good = open_corpus([text], cache=tmp_path / "cache")
    damage(good.folder / name)
    lines: list[str] = []
    again = open_corpus([text], cache=tmp_path / "cache", progress=lines.append)
    assert again.fingerprint == good.fingerprint
    assert re.search(f"^warning: the cache .* is damaged: {said}.*; building it again$", lines[0])
    assert open_corpus([text], cache=tmp_path / "cache").fingerprint == good.fingerprint
    assert not list((tmp_path / "cache").glob("*/.building-*"))


def test_damaged_text_is_read_again(tmp_path: Path, text: Path):
    good = open_corpus([text], cache=tmp_path / "cache")
    flip(next((tmp_path / "cache/text").iterdir()) / "text.bin")
    shutil.rmtree(good.folder)
    lines: list[str] = []
    again = open_corpus([text], cache=tmp_path / "cache", progress=lines.append)
    assert again.fingerprint == good.fingerprint
    assert any("text.bin does not match its checksum" in line for line in lines)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from gatewright.data import open_corpus
from gatewright.errors import RunFailure
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    open_corpus([sys.argv[1]], cache=Path(sys.argv[2]))
except RunFailure as failure:
    print(failure)
"""


@pytest.mark.parametrize("limit", [1_000, 40_000, 70_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, text: Path, limit: int):
    done = run_python(LIMITED, text, tmp_path / "cache", limit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot write the corpus cache in ")
    assert "GATEWRIGHT_CACHE" in done.stdout
    assert done.stdout.count("\n") == 1
    # 60 kB of text fit below 70 kB, its tokens do not: the finished text stays, half its tokens do not.
    left = sorted(path.name for path in (tmp_path / "cache").glob("*/*"))
    assert len(left) == (1 if limit == 70_000 else 0)
    assert not [name for name in left if name.startswith(".")]
    assert open_corpus([text], cache=tmp_path / "cache").train_bytes > 50_000


def test_a_cache_that_cannot_be_made(tmp_path: Path, text: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFailure, match=r"cannot write the corpus cache in .*set GATEWRIGHT_CACHE"):
        open_corpus([text], cache=tmp_path / "file")


KILLED = """
import os, signal, sys
from pathlib import Path
from gatewright.data import open_corpus

def progress(line):
    if "near-duplicates" in line:
        os.kill(os.getpid(), signal.SIGKILL)

open_corpus([sys.argv[1]], cache=Path(sys.argv[2]), progress=progress)
"""


def test_a_killed_build_is_swept_away(tmp_path: Path, text: Path):
    done = run_python(KILLED, text, tmp_path / "cache")
    assert done.returncode == -9
    assert len(list((tmp_path / "cache/text").glob(".building-*"))) == 1
    assert open_corpus([text], cache=tmp_path / "cache").train_bytes > 50_000
    assert not list((tmp_path / "cache").glob("*/.building-*"))


TOGETHER = """
import sys
from pathlib import Path
from gatewright.data import open_corpus
print(open_corpus([sys.argv[1]], cache=Path(sys.argv[2])).fingerprint)
"""


def test_two_processes_build_the_same_at_once(tmp_path: Path, text: Path):
    command = [sys.executable, "-c", TOGETHER, str(text), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = {process.communicate(timeout=60)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert prints == {open_corpus([text], cache=tmp_path / "cache").fingerprint + "\n"}
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 1


def test_the_faster_of_two_builds_is_kept(tmp_path: Path):
    def slow(folder: Path) -> dict[str, str]:
        # While this one builds, another process finishes the same key.
        if not (tmp_path / "kind/key").exists():
            cached_folder(tmp_path, "kind", "key", quick, print)
        (folder / "file").write_text("slow")
        return {}

    def quick(folder: Path) -> dict[str, str]:
        (folder / "file").write_text("quick")
        return {}

    place, _ = cached_folder(tmp_path, "kind", "key", slow, print)
    assert (place / "file").read_text() == "quick"
    assert [path.name for path in place.parent.iterdir()] == ["key"]
