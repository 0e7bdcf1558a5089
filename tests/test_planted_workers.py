"""Many faults at a time: each is judged in a copy of its own, by a process that forks for every run."""

from __future__ import annotations

from pathlib import Path

from scripts import planted

CODE = "def double(x):\n    return 2 * x\n"
TEST = "from toy import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
PATCH = """Fault: it returns {becomes}.
Test: tests/test_toy.py::test_double

--- a/src/toy.py
+++ b/src/toy.py
@@ -1,2 +1,2 @@
 def double(x):
-    return 2 * x
+    return {becomes}
"""


def test_many_faults_are_judged_side_by_side(tmp_path: Path, capfd):
    root = tmp_path / "toy"
    for folder in ("src", "tests/planted"):
        (root / folder).mkdir(parents=True)
    (root / "src/toy.py").write_text(CODE)
    (root / "tests/test_toy.py").write_text(TEST)
    # The third is no fault at all, the fourth breaks the import: neither counts as noticed.
    for number, becomes in enumerate(["3 * x", "x", "x + x", ")", "x ** 2"]):
        (root / f"tests/planted/{number}.patch").write_text(PATCH.format(becomes=becomes))
    assert planted.main(["--jobs", "2"], root) == 1
    out = capfd.readouterr().out
    judged = [line.split()[:2] for line in out.splitlines() if line.startswith(("noticed", "MISSED"))]
    assert judged == [
        ["noticed", "0.patch:"],
        ["noticed", "1.patch:"],
        ["MISSED", "2.patch:"],
        ["MISSED", "3.patch:"],
        ["noticed", "4.patch:"],
    ]
    assert "2.patch: it returns x + x. not noticed: tests/test_toy.py::test_double passes" in out
    assert "broke instead of failing (pytest exit code 4)" in out
    assert "3 of 5 planted faults noticed" in out
    assert (root / "src/toy.py").read_text() == CODE


def test_every_fault_still_applies_and_names_a_test(tmp_path: Path):
    planted.copy_tree(planted.ROOT, tmp_path / "tree")
    patches = sorted((planted.ROOT / "tests" / "planted").glob("*.patch"))
    assert len(patches) > 70
    for patch in patches:
        fault = planted.read_fault(patch)
        assert planted.apply(patch, tmp_path / "tree") == "", patch.name
        assert planted.apply(patch, tmp_path / "tree", reverse=True) == "", patch.name
        path, _, name = fault.test.partition("::")
        function = name.split("::")[-1].split("[")[0]
        assert f"def {function}(" in (planted.ROOT / path).read_text(encoding="utf-8"), fault.test
