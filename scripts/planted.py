"""Plant each fault of tests/planted in a copy of the tree: the test that it names must then fail.

    python scripts/planted.py [--jobs N] [WORD ...]

A patch begins with two lines, "Fault: one sentence" and "Test: tests/file.py::name"; a unified diff follows.
The named test has to pass without the fault, and to fail (not to break) with it. A WORD picks patches by
a part of their name. Lines that moved are found again; lines that changed are an error, so a patch with
one line of context lives longest. Name a test without random examples: those are slow to report a
failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "scripts", "docs", "reproductions", "requirements")
PASSED, FAILED, BROKEN = 0, 1, 99  # pytest's exit codes; 2 to 5 mean that no test was judged, 99 is ours
PYTEST = ("-q", "-x", "--tb=short", "-p", "no:cacheprovider")
# pytest says that a plugin which is loaded before it cannot have its assertions rewritten; none needs it.
LOADED_EARLY = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
PRELOADED = (
    "torch",
    "pytest",
    "jaxtyping",
    "beartype",
    "hypothesis",
    "hypothesis.internal.conjecture.engine",
)
OUTPUT = "planted-output.txt"
FEW = 3  # up to so many faults, starting pytest anew for each is faster than preparing a worker
Run = Callable[[Path, list[str]], tuple[int, str]]


@dataclass(frozen=True)
class Fault:
    """One patch, what is wrong with the code that it leaves, and the test that must notice."""

    patch: Path
    sentence: str
    test: str


def read_fault(patch: Path) -> Fault:
    """Return a patch's fault. Raises ValueError when a header line is missing."""
    head = patch.read_text(encoding="utf-8").partition("\n--- ")[0]
    found = {key: re.search(rf"^{key}: (.+)$", head, re.MULTILINE) for key in ("Fault", "Test")}
    missing = [key for key, match in found.items() if not match]
    if missing:
        raise ValueError(f"{patch.name}: no line '{missing[0]}: ...' before the diff")
    return Fault(patch, *(match[1].strip() for match in found.values() if match))


def copy_tree(root: Path, to: Path) -> None:
    """Copy what the tests need."""
    to.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, to / name, ignore=ignore)
    for path in root.glob("*.*"):
        if path.is_file():
            shutil.copy2(path, to)
    for name in ("Makefile", "LICENSE", "NOTICE"):
        if (root / name).is_file():
            shutil.copy2(root / name, to)


def apply(patch: Path, tree: Path, *, reverse: bool = False) -> str:
    """Apply a patch to a tree; return "" or what is wrong. Whole or not at all."""
    command = [
        "git",
        "apply",
        "--whitespace=nowarn",
        *(["--reverse"] if reverse else []),
        str(patch.resolve()),
    ]
    # Inside a repository git would resolve the paths against that repository's root.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests on the tree's own sources; return pytest's exit code and output."""
    command = [sys.executable, "-m", "pytest", *PYTEST, *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


class Worker:
    """A process that imports torch and pytest once and forks for every run: imports are most of one."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, tree: Path, tests: list[str]) -> tuple[int, str]:
        """Do what `run_tests` does."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(tree), tests]) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline() or BROKEN)
        return code, (tree / OUTPUT).read_text(encoding="utf-8")

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


def serve() -> None:
    """Be a worker: for each line [tree, tests] on stdin, fork, run the tests, print the exit code."""
    for line in sys.stdin:
        tree, tests = json.loads(line)
        for name in PRELOADED if (Path(tree) / "src" / "gatewright").is_dir() else ["pytest"]:
            importlib.import_module(name)
        child = os.fork()
        if child == 0:
            code = BROKEN
            try:
                code = run_here(Path(tree), tests)
            except BaseException:
                traceback.print_exc()
            finally:  # whatever happened, the child must not come back into this loop
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def run_here(tree: Path, tests: list[str]) -> int:
    """Run tests in this process, its output going to a file of the tree; return the exit code."""
    import pytest

    out = os.open(tree / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree / "src")
    sys.path.insert(0, str(tree / "src"))
    code = int(pytest.main([*PYTEST, *LOADED_EARLY, *tests]))
    package = sys.modules.get("gatewright")
    if package is not None and not str(package.__file__).startswith(str(tree)):
        os.write(out, f"the tests imported {package.__file__}, not the copy".encode())
        return BROKEN
    return code


def judge(fault: Fault, tree: Path, run: Run) -> str:
    """Plant one fault, run its test, take the fault out again; return "" when the test noticed."""
    problem = apply(fault.patch, tree)
    if problem:
        return f"does not apply: {problem}"
    code, output = run(tree, [fault.test])
    apply(fault.patch, tree, reverse=True)
    if code == PASSED:
        return f"not noticed: {fault.test} passes"
    if code != FAILED:
        return f"{fault.test} broke instead of failing (pytest exit code {code}):\n{output}"
    return ""


def judge_all(faults: list[Fault], root: Path, folder: Path, runs: list[Run]) -> int:
    """Judge faults, one copy of the tree per run, and say so line by line; return how many went unnoticed."""
    free: queue.SimpleQueue[tuple[Path, Run]] = queue.SimpleQueue()
    for number, run in enumerate(runs):
        copy_tree(root, folder / str(number))
        free.put((folder / str(number), run))
    code, output = runs[0](folder / "0", sorted({fault.test for fault in faults}))
    if code != PASSED:
        print(
            f"the named tests do not pass without a fault (pytest exit code {code}):\n{output}",
            file=sys.stderr,
        )
        return len(faults)

    def judge_next(fault: Fault) -> str:
        tree, run = free.get()
        try:
            return judge(fault, tree, run)
        finally:
            free.put((tree, run))

    bad = 0
    with ThreadPoolExecutor(len(runs)) as pool:
        for fault, problem in zip(faults, pool.map(judge_next, faults), strict=True):
            bad += bool(problem)
            said = f"{fault.patch.name}: {fault.sentence} {problem}"
            print(f"{'MISSED ' if problem else 'noticed'}  {said}", flush=True)
    print(f"{len(faults) - bad} of {len(faults)} planted faults noticed")
    return bad


def main(argv: list[str], root: Path = ROOT) -> int:
    """Judge every fault, or those whose file name holds a given word; return 1 if any went unnoticed."""
    parser = argparse.ArgumentParser(description="Plant faults; the test that each names must fail.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only patches whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time (default: 1)")
    options = parser.parse_args(argv)
    patches = sorted((root / "tests" / "planted").glob("*.patch"))
    words = options.words
    chosen = [patch for patch in patches if not words or any(word in patch.name for word in words)]
    if not chosen:
        print(f"no patch in tests/planted matches {' '.join(words) or '*.patch'}", file=sys.stderr)
        return 2
    faults = [read_fault(patch) for patch in chosen]
    jobs = max(1, min(options.jobs, len(faults)))
    workers = [Worker() for _ in range(jobs)] if len(faults) > FEW and hasattr(os, "fork") else []
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs: list[Run] = [worker.run for worker in workers] or [run_tests] * jobs
            return int(judge_all(faults, root, Path(folder).resolve(), runs) > 0)
    finally:
        for worker in workers:
            worker.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        serve()
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
