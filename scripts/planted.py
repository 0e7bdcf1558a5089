"""Plant each fault of tests/planted in a copy of the tree: the test that it names must then fail.

A patch begins with two lines, "Fault: one sentence" and "Test: tests/file.py::name"; a unified diff follows.
The named test has to pass without the fault, and to fail (not to break) with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "scripts", "benchmarks", "docs", "reproductions", "requirements")
PASSED, FAILED = 0, 1  # pytest's exit codes; 2 to 5 mean that no test was judged


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
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def judge(fault: Fault, tree: Path) -> str:
    """Plant one fault, run its test, take the fault out again; return "" when the test noticed."""
    problem = apply(fault.patch, tree)
    if problem:
        return f"does not apply: {problem}"
    code, output = run_tests(tree, [fault.test])
    apply(fault.patch, tree, reverse=True)
    if code == PASSED:
        return f"not noticed: {fault.test} passes"
    if code != FAILED:
        return f"{fault.test} broke instead of failing (pytest exit code {code}):\n{output}"
    return ""


def main(argv: list[str], root: Path = ROOT) -> int:
    """Judge every fault, or those whose file name holds a given word; return 1 if any went unnoticed."""
    patches = sorted((root / "tests" / "planted").glob("*.patch"))
    chosen = [patch for patch in patches if not argv or any(word in patch.name for word in argv)]
    if not chosen:
        print(f"no patch in tests/planted matches {' '.join(argv) or '*.patch'}", file=sys.stderr)
        return 2
    faults = [read_fault(patch) for patch in chosen]
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(root, tree)
        code, output = run_tests(tree, sorted({fault.test for fault in faults}))
        if code != PASSED:
            print(f"the named tests do not pass without a fault:\n{output}", file=sys.stderr)
            return 1
        for fault in faults:
            problem = judge(fault, tree)
            bad += bool(problem)
            print(
                f"{'MISSED ' if problem else 'noticed'}  {fault.patch.name}: {fault.sentence} {problem}",
                flush=True,
            )
    print(f"{len(faults) - bad} of {len(faults)} planted faults noticed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
