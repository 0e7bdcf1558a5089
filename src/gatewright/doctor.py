"""Look at this installation and machine, and say what is missing for which command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import __version__

if TYPE_CHECKING:
    import torch

State = Literal["ok", "note", "fail"]
MARKS: dict[State, str] = {"ok": "ok  ", "note": "note", "fail": "FAIL"}

TORCH_NEEDED = (2, 13)
# What the quickstart writes: the built corpus, one run's checkpoints and its report.
DISK_NEEDED_GB = 2.0
MEMORY_NEEDED_GB = 4.0
OPTIONAL = {
    "pyarrow": "parquet files as training text: pip install 'gatewright[parquet]'",
    "gguf": "GGUF files as models that generate and chat: pip install 'gatewright[gguf]'",
}


@dataclass(frozen=True)
class Check:
    """One line of the report. `state`: ok; note = works, with less; fail = gatewright does not work here."""

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Every check, in the order in which they are printed."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Say whether nothing failed."""
        return all(check.state != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def to_text(self) -> str:
        """Return one line per check, advice below it, and a closing line."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{MARKS[check.state]}  {check.name:<{width}}  {check.value}")
            if check.advice:
                lines.append(f"{'':<{width + 8}}{check.advice}")
        failed = [check.name for check in self.checks if check.state == "fail"]
        lines.append(f"Not ready: {', '.join(failed)}." if failed else "Ready.")
        return "\n".join(lines)


def doctor() -> Diagnosis:
    """Return the diagnosis of this installation; writes nothing but a probe file in the cache folder."""
    groups: tuple[Callable[[], list[Check]], ...] = (
        _python, _torch, _processor, _devices, _native, _space, _optional, _corpus, _self_test
    )  # fmt: skip
    checks: list[Check] = []
    for group in groups:
        try:
            checks += group()
        except Exception as error:  # a check that breaks is itself a finding
            checks.append(Check(group.__name__.strip("_"), f"{type(error).__name__}: {error}", "fail"))
    return Diagnosis(tuple(checks))


def _python() -> list[Check]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    return [
        Check("gatewright", __version__),
        Check("python", version, "ok" if good else "fail", "" if good else "needs 3.11 or newer"),
    ]


def _torch() -> list[Check]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    good = found >= TORCH_NEEDED
    advice = "" if good else "needs 2.13 or newer: pip install 'torch>=2.13'"
    return [Check("torch", f"{torch.__version__} ({build})", "ok" if good else "fail", advice)]


def _processor() -> list[Check]:
    import torch

    flags = _cpu_flags()
    wide = [
        name
        for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
        if name in flags
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    has_bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return [
        Check("processor", f"{_cpu_name()}, {cores} cores"),
        Check("vector units", f"torch uses {capability}; processor has {', '.join(wide) or 'none known'}"),
        Check(
            "bf16 on CPU",
            "in hardware" if has_bf16 else "emulated",
            "ok" if has_bf16 else "note",
            "" if has_bf16 else "fp32 is the faster choice here",
        ),
        Check(
            "threads",
            f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})",
        ),
        Check(
            "compiler",
            compiler or "none",
            "ok" if compiler else "note",
            "" if compiler else "the native kernels need one: install g++ or clang++",
        ),
    ]


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpu_field("flags") or _cpu_field("Features")).split())


def _cpu_field(name: str) -> str:
    """Return the first value of a field of /proc/cpuinfo, "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next(
        (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), ""
    )


def _devices() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("GPU", "none; everything runs on the CPU")]
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    told = ", ".join(f"{device.name} ({device.total_memory / 1e9:.0f} GB)" for device in devices)
    return [Check("GPU", told)]


def _space() -> list[Check]:
    from gatewright.data.cache import cache_root

    root = cache_root()
    nearest = next(path for path in (root, *root.parents) if path.exists())
    checks = [_disk("disk here", Path.cwd()), _disk("disk of the cache", nearest)]
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".gatewright-probe-"):
            checks.append(Check("cache folder", str(root)))
    except OSError as error:
        advice = "set GATEWRIGHT_CACHE to a folder that can be written"
        checks.append(Check("cache folder", f"{root}: {error.strerror}", "fail", advice))
    memory = _available_memory_gb()
    if memory is not None:
        small = memory < MEMORY_NEEDED_GB
        advice = f"the quickstart wants {MEMORY_NEEDED_GB:.0f} GB" if small else ""
        checks.append(Check("memory", f"{memory:.1f} GB available", "note" if small else "ok", advice))
    return checks


def _disk(name: str, place: Path) -> Check:
    free = shutil.disk_usage(place).free / 1e9
    small = free < DISK_NEEDED_GB
    advice = f"the quickstart wants {DISK_NEEDED_GB:.0f} GB" if small else ""
    return Check(name, f"{free:.1f} GB free at {place}", "note" if small else "ok", advice)


def _available_memory_gb() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] * 1024 / 1e9 if sizes else None


def _optional() -> list[Check]:
    checks = []
    for package, use in OPTIONAL.items():
        try:
            checks.append(Check(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(package, "not installed", "note", use))
    return checks


def _corpus() -> list[Check]:
    from gatewright.data.sources import default_sources

    sources, missing = default_sources()
    found = ", ".join(source.name for source in sources) or "no domain"
    checks = [Check("default corpus", found, "ok" if not missing else "note")]
    checks += [Check("default corpus", line, "note") for line in missing]
    return checks


def _native() -> list[Check]:
    import torch

    from gatewright.kernels import choose_attention, native

    found = native.status()
    advice = "" if found.ready else "torch's own operators compute experts and attention instead: slower"
    heads = torch.zeros(1, 1, 1, 64)
    form, reason = choose_attention(heads, heads)
    return [
        Check("native kernels", found.reason, "ok" if found.ready else "note", advice),
        Check("attention", f"{form}: {reason}"),
    ]


def _self_test() -> list[Check]:
    """Compare what computes with the reference in fp64: one layer, output and every gradient, in fp64 (by
    torch's matmuls) and in fp32 (by the chosen backend).
    """
    import torch

    from gatewright.kernels import choose_backend

    name, reason = choose_backend()
    wanted = _one_layer("reference", torch.float64)
    told, good = [], True
    for backend, dtype, bound in (("grouped", torch.float64, 1e-12), (name, torch.float32, 1e-5)):
        pairs = zip(_one_layer(backend, dtype), wanted, strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        good = good and worst < bound
        told.append(f"{backend} by {worst:.1e} ({'fp64' if dtype == torch.float64 else 'fp32'})")
    advice = (
        "" if good else "results of this installation cannot be trusted; please report it with this output"
    )
    text = f"output and gradients differ from the reference: {', '.join(told)}"
    return [Check("backend", f"{name}: {reason}"), Check("self-test", text, "ok" if good else "fail", advice)]


def _one_layer(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return one layer's output and gradients in fp64, computed in `dtype` from numbers that it holds."""
    import torch

    from gatewright.parts import MoELayer, balance_loss

    draws = torch.Generator().manual_seed(0)
    x = torch.randn(11, 6, generator=draws).to(dtype).requires_grad_()
    layer = MoELayer(6, 5, 2, 7, num_shared_experts=1, backend=backend).to(dtype)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draws))
    y, stats = layer(x)
    (y.square().sum() + balance_loss(stats)).backward()
    return [one.detach().double() for one in (y, x.grad, *(p.grad for p in layer.parameters()))]
