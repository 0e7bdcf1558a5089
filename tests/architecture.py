"""The rules of docs/design.md as functions over a source tree: each returns what breaks it, one line each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LOW = {"errors", "places", "kernels", "parts", "objectives", "backbones", "papers", "data"}
# Which rooms each room may import, itself apart. A room without a line here breaks the test.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "places": set(),
    "kernels": {"errors", "places"},
    "parts": {"errors", "kernels"},
    "objectives": {"errors", "kernels", "parts"},
    "backbones": {"errors", "kernels", "parts"},
    "papers": {"errors", "kernels", "parts", "objectives", "backbones"},
    "data": {"errors", "places"},
    "parallel": LOW,
    "conversion": {"errors", "kernels", "parts", "backbones", "papers"},
    "evaluation": LOW,
    "inspection": LOW | {"evaluation"},
    "training": LOW | {"evaluation", "inspection", "parallel"},
    "measuring": LOW | {"inspection", "evaluation", "training", "conversion", "experiments"},
    "generation": LOW | {"evaluation", "training", "conversion", "loading"},
    "loading": LOW | {"training", "conversion"},
    "estimators": LOW | {"training"},
    "beams": {"errors", "backbones", "parts", "generation"},
    "experiments": LOW
    | {
        "evaluation",
        "inspection",
        "training",
        "parallel",
        "conversion",
        "generation",
        "estimators",
        "loading",
        "beams",
    },
    "doctor": LOW,
    "testing": LOW,
    "cli": LOW
    | {
        "evaluation",
        "inspection",
        "training",
        "parallel",
        "conversion",
        "generation",
        "loading",
        "estimators",
        "beams",
        "experiments",
        "measuring",
        "doctor",
    },
}
# Packages that belong to one room; everything else imports them through it.
HOME_OF = {
    "matplotlib": "inspection",
    "tyro": "cli",
    "tensorboard": "training",
    "transformers": "conversion",
    "gguf": "conversion",
    "sklearn": "estimators",
    "sacrebleu": "evaluation",
}
PARTS_NEVER = {"logging", "torch.distributed", "tyro", "rich", "argparse"}
OBJECTIVES_SEE = {
    *("gatewright.parts.balancing", "gatewright.parts.losses", "gatewright.parts.stats"),
    *("gatewright.parts.draws", "gatewright.kernels.cross_entropy"),
}
PAPER_IDS = (
    *("local_experts", "hme", "deep_moe", "sparsely_gated", "gshard", "switch", "glam", "vmoe", "st_moe"),
    *("switch_t5", "sparsely_gated_mt"),
    *("expert_choice", "mixtral", "deepseek_moe", "deepseek_v2", "deepseek_v3", "olmoe"),
    *("qwen2_moe", "qwen3_moe", "gpt_oss", "llama4"),
)
TORCH_WIDE = (
    *("set_num_threads", "set_num_interop_threads", "set_default_dtype", "set_default_device", "manual_seed"),
    *("use_deterministic_algorithms", "set_float32_matmul_precision", "set_flush_denormal"),
)
PROCESS_WIDE = {
    *(f"torch.{name}" for name in TORCH_WIDE),
    *("random.seed", "numpy.random.seed", "np.random.seed", "mallopt", "libc.mallopt", "logging.basicConfig"),
    *("os.environ.setdefault", "os.environ.update", "os.environ.pop", "os.putenv", "signal.signal"),
    *("warnings.filterwarnings", "warnings.simplefilter", "multiprocessing.set_start_method"),
}


def python_files(root: Path) -> list[Path]:
    """Return every Python file below `root`, in order."""
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def dotted(path: Path, package: Path) -> str:
    """Return a file's module name; `package` is the folder of the package itself."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, module: str = "") -> Iterator[tuple[int, str]]:
    """Yield (line, imported module), imports inside functions included, relative ones resolved.

    `from a.b import c` gives a.b.c: whether c is a module or a name in it, its room is the same.
    """
    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            start = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*start, alias.name])) for alias in node.names)


def within(name: str, package: str) -> bool:
    """Say whether a dotted name is `package` or below it."""
    return name == package or name.startswith(f"{package}.")


def wrong_imports(package: Path) -> list[str]:
    """Imports against the direction of the rooms, and outside packages used out of their room."""
    found = []
    for path in python_files(package):
        module = dotted(path, package)
        room = module.split(".")[1] if "." in module else ""
        if not room:
            continue  # the package's own __init__ hands out names of any room
        for line, name in imports(path, module):
            reason = _against_rooms(module, room, name, package.name) or _against_homes(room, name)
            if reason:
                found.append(f"{path.relative_to(package.parent)}:{line} imports {name}: {reason}")
    return found


def _against_rooms(module: str, room: str, name: str, package: str) -> str:
    if not within(name, package):
        return ""
    if room not in MAY_IMPORT:
        return f"the room {room} has no line in MAY_IMPORT"
    parts = name.split(".")
    target = parts[1] if len(parts) > 1 else ""
    if target not in {room, "__version__", *MAY_IMPORT[room]}:
        return f"{room} may import {', '.join(sorted(MAY_IMPORT[room])) or 'no other room'}"
    low = target in ("parts", "kernels")
    if room == "objectives" and low and not any(within(name, seen) for seen in OBJECTIVES_SEE):
        return "objectives see parts.{balancing,draws,losses,stats} and kernels.cross_entropy only"
    own = module.split(".")[2:3]
    if room == target == "papers" and own and own[0] in PAPER_IDS and parts[2:3] and parts[2] in PAPER_IDS:
        return "a paper never imports another paper"
    return ""


def _against_homes(room: str, name: str) -> str:
    for outside, home in HOME_OF.items():
        if within(name, outside) and room != home:
            return f"{outside} belongs to {home}"
    if within(name, "torch.utils.tensorboard") and room != "training":
        return "tensorboard belongs to training"
    if room in ("parts", "kernels") and any(within(name, never) for never in PARTS_NEVER):
        return f"{room} is pure mechanism"
    return ""


def foreign_oracle(oracle: Path, package: str = "gatewright") -> list[str]:
    """Imports of the package in the oracle, which has to stay independent of what it judges."""
    return [
        f"{path.relative_to(oracle.parent)}:{line} imports {name}"
        for path in python_files(oracle)
        for line, name in imports(path)
        if within(name, package)
    ]


def too_long(root: Path, package: Path) -> list[str]:
    """Files over 300 lines, functions over 60; commands over 60 and papers over 120 lines.

    Functions of tests are left out: a literal of test data may be long.
    """
    found = []
    for path in python_files(root):
        limit = 300
        if path.parent == package / "cli" and path.stem not in (
            "__init__",
            "__main__",
            "manual",
            "paper",
            "parse",
            "run",
        ):
            limit = 60
        elif path.parent == package / "papers" and path.stem in PAPER_IDS:
            limit = 120
        text = path.read_text(encoding="utf-8")
        count = len(text.splitlines())
        if count > limit:
            found.append(f"{path.relative_to(root)} has {count} lines; at most {limit}")
        for node in ast.walk(ast.parse(text)) if root.name != "tests" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    found.append(
                        f"{path.relative_to(root)}:{node.lineno} {node.name} has {length} lines; at most 60"
                    )
    return found


def process_wide(package: Path) -> list[str]:
    """Process-wide settings touched at import: calls and os.environ writes outside any function."""
    return [
        f"{path.relative_to(package.parent)}:{node.lineno} {ast.unparse(node)[:60]}"
        for path in python_files(package)
        for node in _outside_functions(ast.parse(path.read_text(encoding="utf-8")))
        if _is_process_wide(node)
    ]


def _outside_functions(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.expr | ast.stmt):
            yield child
        yield from _outside_functions(child)


def _is_process_wide(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in PROCESS_WIDE
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign):
        targets = [node.target]
    told = [ast.unparse(target) for target in targets]
    return any(text.startswith(("os.environ[", "torch.backends.", "sys.path")) for text in told)


def unfinished(package: Path) -> list[str]:
    """Marks of unfinished work."""
    found = []
    for path in python_files(package):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if any(mark in line for mark in ("TODO", "FIXME", "XXX", "raise NotImplementedError")):
                found.append(f"{path.relative_to(package.parent)}:{number} {line.strip()}")
    return found
