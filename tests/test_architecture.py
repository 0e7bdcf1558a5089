"""The house rules of docs/design.md hold, and each check that says so can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import architecture as rules

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "gatewright"


def grow(folder: Path, files: dict[str, str]) -> Path:
    """Write a small tree and return its package folder."""
    for name, text in files.items():
        path = folder / "gatewright" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "gatewright"


def test_imports_go_one_way():
    assert rules.wrong_imports(PACKAGE) == []


def test_no_process_wide_setting_at_import():
    assert rules.process_wide(PACKAGE) == []


def test_files_and_functions_stay_short():
    folders = [ROOT / name for name in ("src", "tests", "scripts")]
    assert [line for folder in folders for line in rules.too_long(folder, PACKAGE)] == []


def test_nothing_is_left_unfinished():
    assert rules.unfinished(PACKAGE) == []


def test_the_oracle_stands_alone():
    oracle = ROOT / "tests" / "oracle"
    assert rules.python_files(oracle), "the oracle is gone"
    assert rules.foreign_oracle(oracle) == []


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("kernels/a.py", "from gatewright.parts import b", "kernels may import errors"),
        ("parts/a.py", "from gatewright.papers import switch", "parts may import errors, kernels"),
        ("parts/a.py", "def f():\n    import gatewright.training.loop", "parts may import"),
        ("parts/a.py", "from ..cli import parse", "parts may import"),
        ("parts/a.py", "import torch.distributed as dist", "parts is pure mechanism"),
        ("parts/a.py", "from torch import distributed", "parts is pure mechanism"),
        ("parts/a.py", "import logging", "parts is pure mechanism"),
        ("objectives/a.py", "from gatewright.parts.layer import MoELayer", "objectives see parts"),
        ("objectives/a.py", "from gatewright.parts import Stats", "objectives see parts"),
        ("objectives/a.py", "from gatewright.kernels import linears", "kernels.cross_entropy only"),
        ("objectives/a.py", "from gatewright.backbones import mlp", "objectives may import"),
        ("papers/switch.py", "from gatewright.papers.mixtral import Settings", "never imports another paper"),
        ("papers/switch.py", "from . import mixtral", "never imports another paper"),
        ("papers/switch.py", "import gatewright.data", "papers may import"),
        ("data/a.py", "from gatewright.parts import Stats", "data may import errors"),
        ("evaluation/a.py", "from gatewright.inspection import tables", "evaluation may import"),
        ("inspection/a.py", "from gatewright.training import loop", "inspection may import"),
        ("training/a.py", "from gatewright.experiments import race", "training may import"),
        ("experiments/a.py", "from gatewright import cli", "experiments may import"),
        ("training/a.py", "import matplotlib.pyplot as plt", "matplotlib belongs to inspection"),
        ("training/a.py", "import tyro", "tyro belongs to cli"),
        ("parts/a.py", "from transformers import AutoModel", "transformers belongs to conversion"),
        ("conversion/a.py", "from gatewright.training import loop", "conversion may import"),
        (
            "experiments/a.py",
            "from sklearn.tree import DecisionTreeRegressor",
            "sklearn belongs to estimators",
        ),
        ("estimators/a.py", "from gatewright.experiments import lab", "estimators may import"),
        (
            "papers/a.py",
            "from torch.utils.tensorboard import SummaryWriter",
            "tensorboard belongs to training",
        ),
        ("new_room/a.py", "import gatewright.parts", "new_room has no line"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, name: str, text: str, reason: str):
    (line,) = rules.wrong_imports(grow(tmp_path, {name: text}))
    assert name in line
    assert reason in line


def test_allowed_imports_pass(tmp_path: Path):
    package = grow(
        tmp_path,
        {
            "__init__.py": "from gatewright.parts import MoELayer",
            "parts/a.py": "import torch\nfrom gatewright.kernels import plan\nfrom . import b",
            "objectives/a.py": "from gatewright.parts.balancing import z_loss\nfrom ..parts import stats\n"
            "from gatewright.kernels import cross_entropy",
            "papers/registry.py": "from gatewright.papers import switch, mixtral",
            "papers/switch.py": "from gatewright.papers.base import Info",
            "inspection/a.py": "import matplotlib.pyplot\nfrom gatewright.evaluation import bits",
            "training/a.py": "from gatewright.inspection import record\nimport gatewright.data.corpus",
            "cli/race.py": "import tyro\nfrom ..experiments import race",
        },
    )
    assert rules.wrong_imports(package) == []


def test_a_relative_import_from_an_init_stays_in_its_room(tmp_path: Path):
    package = grow(
        tmp_path,
        {"parts/__init__.py": "from .layer import MoELayer", "kernels/__init__.py": "from ..cli import run"},
    )
    (line,) = rules.wrong_imports(package)
    assert "gatewright.cli.run" in line


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.set_num_threads(1)",
        "import os\nos.environ['OMP_NUM_THREADS'] = '1'",
        "import os\nos.environ.setdefault('A', '1')",
        "import os\ndel os.environ['A']",
        "import torch\nif True:\n    torch.backends.mkldnn.enabled = False",
        "import random\nclass A:\n    random.seed(0)",
        "import ctypes\nlibc = ctypes.CDLL(None)\nx = libc.mallopt(-3, 1)",
    ],
)
def test_a_process_wide_setting_at_import_is_found(tmp_path: Path, text: str):
    assert len(rules.process_wide(grow(tmp_path, {"parts/a.py": text}))) == 1


def test_a_process_wide_setting_inside_a_function_is_an_explicit_call(tmp_path: Path):
    text = "import torch\ndef go():\n    torch.set_num_threads(1)\nlater = lambda: torch.manual_seed(1)"
    assert rules.process_wide(grow(tmp_path, {"cli/a.py": text})) == []


@pytest.mark.parametrize(
    ("name", "lines", "limit"),
    [
        ("parts/a.py", 301, 300),
        ("cli/race.py", 61, 60),
        ("papers/switch.py", 121, 120),
        ("cli/parse.py", 301, 300),
    ],
)
def test_a_long_file_is_found(tmp_path: Path, name: str, lines: int, limit: int):
    package = grow(tmp_path, {name: "x = 1\n" * lines})
    assert rules.too_long(tmp_path, package) == [f"gatewright/{name} has {lines} lines; at most {limit}"]
    package = grow(tmp_path, {name: "x = 1\n" * limit})
    assert rules.too_long(tmp_path, package) == []


def test_a_long_function_is_found(tmp_path: Path):
    package = grow(tmp_path, {"parts/a.py": "def f():\n" + "    x = 1\n" * 60})
    assert rules.too_long(tmp_path, package) == ["gatewright/parts/a.py:1 f has 61 lines; at most 60"]


def test_an_oracle_that_leans_on_the_package_is_found(tmp_path: Path):
    oracle = (
        grow(tmp_path, {"oracle/layer.py": "def f():\n    from gatewright.parts import MoELayer"}) / "oracle"
    )
    assert rules.foreign_oracle(oracle) == ["oracle/layer.py:2 imports gatewright.parts.MoELayer"]


def test_unfinished_work_is_found(tmp_path: Path):
    package = grow(tmp_path, {"parts/a.py": "def f():\n    raise NotImplementedError\n"})
    assert rules.unfinished(package) == ["gatewright/parts/a.py:2 raise NotImplementedError"]


def loaded_after(statement: str) -> set[str]:
    """Return the modules of a fresh interpreter after one statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


HEAVY = (
    "transformers",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "tyro",
    "rich",
    "gatewright.cli",
    "gatewright.data",
)
COMPILERS = ("torch._inductor", "torch.utils.cpp_extension", "triton")


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import gatewright", ("torch", *HEAVY)),
        (
            "import gatewright; [getattr(gatewright, name) for name in gatewright.__all__]",
            (*HEAVY, *COMPILERS),
        ),
    ],
)
def test_importing_the_package_loads_little(statement: str, forbidden: tuple[str, ...]):
    loaded = loaded_after(statement)
    assert "gatewright" in loaded
    assert [name for name in forbidden if name in loaded] == []


def test_a_heavy_import_would_be_seen():
    assert "json.tool" in loaded_after("import json.tool")
    assert "json.tool" not in loaded_after("import json")
