"""Shapes in kernels, parts and backbones are checked in tests; outside them they cost nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from gatewright.backbones import RMSNorm
from gatewright.kernels import DispatchPlan, ExpertWeights, expert_mlp_sorted
from gatewright.parts import select_top, token_choice

ROOT = Path(__file__).resolve().parents[1]
WRONG = {
    "kernels: counts that are no int64": lambda: expert_mlp_sorted(
        torch.ones(3, 4), torch.ones(2), ExpertWeights(torch.ones(2, 5, 4), torch.ones(2, 4, 5), "relu")
    ),
    "kernels: experts that disagree": lambda: ExpertWeights(torch.ones(2, 5, 4), torch.ones(3, 4, 5), "relu"),
    "kernels: slots of one axis": lambda: DispatchPlan(
        torch.zeros(3, dtype=torch.long),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(3, dtype=torch.long),
        True,
    ),
    "parts: scores of three axes": lambda: select_top(torch.ones(2, 3, 4), 1),
    "parts: scores of other tokens": lambda: token_choice(torch.ones(3, 4), torch.ones(2, 4), 2),
    "backbones: integers to be normalised": lambda: RMSNorm(4)(torch.ones(2, 4, dtype=torch.long)),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_shape_is_refused_in_tests(call):
    with pytest.raises(TypeCheckError):
        call()


def test_outside_tests_nothing_is_checked():
    code = (
        "import torch; from gatewright.kernels import DispatchPlan; "
        "DispatchPlan(torch.ones(1), torch.ones(1, 1), torch.ones(1), True); "
        "import sys; sys.exit('beartype' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def bare_tensors(path: Path) -> list[str]:
    """Return the public functions that take or return a tensor without saying its shape."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and (node.name == "forward" or not node.name.startswith("_")):
            told = [*(arg.annotation for arg in node.args.args + node.args.kwonlyargs), node.returns]
            if any(ast.unparse(hint) == "Tensor" for hint in told if hint is not None):
                found.append(f"{path.name}:{node.lineno} {node.name}")
    return found


@pytest.mark.parametrize("room", ["kernels", "parts", "backbones"])
def test_public_functions_say_their_shapes(room: str):
    files = sorted((ROOT / "src" / "gatewright" / room).glob("*.py"))
    # Inside an autograd function torch calls with what it likes; the function around it says the shapes.
    inner = dict.fromkeys(("grouped.py", "balancing.py", "native.py", "noise.py"), "forward")
    bare = [line for path in files for line in bare_tensors(path) if inner.get(path.name) != line.split()[-1]]
    assert [line for line in bare if not line.endswith(" backward")] == []


def test_a_function_without_shapes_is_found(tmp_path: Path):
    page = tmp_path / "a.py"
    page.write_text(
        'def f(x: Tensor) -> Float[Tensor, "T D"]: ...\ndef _g(x: Tensor): ...\ndef h(x: int): ...\n'
    )
    assert bare_tensors(page) == ["a.py:1 f"]
