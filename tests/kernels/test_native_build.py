"""Building the C++ kernels: once, however many processes ask; and where it fails, a reason in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gatewright.kernels import native
from gatewright.kernels.native import build as room
from gatewright.kernels.native.build import BuildFailure, build

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="built on Linux only")

# Writes down each call and makes the file that it is asked for; with FAIL set, complains as compilers do.
FAKE = """#!/bin/sh
[ "$1" = --version ] && { echo "fake compiler ${FAKE_VERSION:-1}"; exit 0; }
echo "$@" >> "$FAKE_LOG"
[ -n "$FAIL" ] && { echo "experts.cpp:7:1: error: no such thing" >&2; exit 1; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && { sleep 0.05; echo made > "$2"; }; shift; done
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Name a compiler that only writes down what it is asked for; return that log."""
    script, log = tmp_path / "fake-c++", tmp_path / "log"
    script.write_text(FAKE)
    script.chmod(0o755)
    log.touch()
    for name, value in (("CXX", script), ("FAKE_LOG", log), ("GATEWRIGHT_CACHE", tmp_path / "cache")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("GATEWRIGHT_NATIVE_CACHE", raising=False)
    return log


def links(log: Path) -> int:
    return sum("-shared" in line for line in log.read_text().splitlines())


def test_a_second_call_builds_nothing(fake: Path):
    first = build()
    calls = fake.read_text()
    assert first.read_text() == "made\n"
    assert calls.count(" -c ") == len(list(room.SOURCES.glob("*.cpp")))
    assert build() == first
    assert fake.read_text() == calls
    assert [path.name for path in first.parent.iterdir() if path.name.startswith("build-")] == []


def test_processes_that_start_together_build_once(fake: Path):
    code = "from gatewright.kernels.native.build import build; print(build())"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    paths = {process.communicate(timeout=100)[0] for process in started}
    assert len(paths) == 1
    assert links(fake) == 1


def test_another_compiler_or_source_is_another_build(
    fake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    first = build()
    monkeypatch.setenv("FAKE_VERSION", "2")
    second = build()
    own = tmp_path / "csrc"
    own.mkdir()
    (own / "one.cpp").write_text("int one;")
    monkeypatch.setattr(room, "SOURCES", own)
    assert len({first, second, build()}) == 3
    assert links(fake) == 3


def test_a_changed_source_is_compiled_alone_and_a_header_with_all(
    fake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    own = tmp_path / "csrc"
    own.mkdir()
    for name in ("one.cpp", "two.cpp", "both.h"):
        (own / name).write_text("")
    monkeypatch.setattr(room, "SOURCES", own)

    def compiled() -> list[str]:
        before = len(fake.read_text().splitlines())
        build()
        lines = fake.read_text().splitlines()[before:]
        return sorted(
            name for line in lines if " -c " in line for name in ("one", "two") if f"/{name}.cpp" in line
        )

    assert compiled() == ["one", "two"]
    (own / "two.cpp").write_text("int two;")
    assert compiled() == ["two"]
    (own / "both.h").write_text("int both();")
    assert compiled() == ["one", "two"]


def test_a_failure_says_why_and_is_not_tried_at_every_start(fake: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(
        BuildFailure, match=r"fake-c\+\+ failed: experts\.cpp:7:1: error: no such thing \(all"
    ):
        build()
    calls = fake.read_text()
    monkeypatch.delenv("FAIL")
    with pytest.raises(BuildFailure, match=r"an earlier build failed, see .*failed\.txt; delete .* to try"):
        build()
    assert fake.read_text() == calls
    (failure,) = (Path(os.environ["GATEWRIGHT_CACHE"]) / "native").glob("*/failed.txt")
    assert "error: no such thing" in failure.read_text()
    failure.unlink()
    assert build().exists()


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildFailure, match=r"no C\+\+ compiler: install g\+\+ or clang\+\+, or name one"):
        build()


def test_a_cache_that_cannot_be_written_is_a_reason(fake: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GATEWRIGHT_NATIVE_CACHE", str(fake))  # a file, not a folder
    with pytest.raises(BuildFailure, match=r"cache folder .*: Not a directory"):
        build()


def test_a_damaged_library_and_a_switch_are_reasons(fake: Path, monkeypatch: pytest.MonkeyPatch):
    path = build()
    found = native._load()
    assert not found.ready
    assert "cannot be loaded" in found.reason
    assert str(path) in found.reason
    monkeypatch.setenv("GATEWRIGHT_NATIVE", "0")
    assert native._load() == native.Status(False, "left out: GATEWRIGHT_NATIVE is 0")


def test_nothing_is_built_before_somebody_computes():
    code = "import sys, gatewright.parts, gatewright.kernels.native as n; assert n._known is None"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_where_there_is_a_compiler_the_sources_compile():
    # Without the kernels their tests are skipped, which must not hide sources that do not compile.
    if os.environ.get("GATEWRIGHT_NATIVE", "1") == "0":
        pytest.skip("left out by name")
    try:
        room.compiler()
    except BuildFailure as failure:
        pytest.skip(str(failure))
    assert native.status().ready, native.status().reason
