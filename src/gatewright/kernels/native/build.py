"""Build the C++ kernels with the system's compiler, once per source, torch, compiler and processor."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gatewright.places import cache_root

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "libgatewright_native.so"
FAILURE = "failed.txt"
# No -ffast-math: NaNs must stay NaNs, and sums keep their order on every machine.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-w")


class BuildFailure(RuntimeError):
    """The kernels cannot be built here; the text says why, in one line."""


def compiler() -> str:
    """Return the C++ compiler: $CXX, else c++, g++ or clang++. Raises: BuildFailure without one."""
    given = os.environ.get("CXX")
    found = shutil.which(given) if given else None
    found = found or next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        raise BuildFailure("no C++ compiler: install g++ or clang++, or name one in CXX")
    return found


def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    words = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.partition(":")[0].strip() in words}))


def _flags() -> tuple[str, ...]:
    machine = platform.machine().lower()
    own = "-march=native" if machine in ("x86_64", "amd64") else "-mcpu=native"
    return (*FLAGS, own)


def _digest(command: str, files: Iterable[Path]) -> str:
    """Return 20 hex digits of these files, torch, the compiler, its flags and the processor."""
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [torch.__version__, str(torch.version.git_version), version, _processor(), sys.platform]
    digest = hashlib.sha256("\0".join([*parts, *_flags()]).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def build_key(command: str) -> str:
    """Return the name of this source, torch, compiler and processor's build: 20 hex digits."""
    return _digest(command, sorted(SOURCES.iterdir()))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, so that processes which start together build once."""
    import fcntl

    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def builds_root() -> Path:
    """Return the folder of builds: $GATEWRIGHT_NATIVE_CACHE, else native/ in the cache."""
    own = os.environ.get("GATEWRIGHT_NATIVE_CACHE")
    return Path(own).expanduser().absolute() if own else cache_root() / "native"


def build() -> Path:
    """Return the built library's path, building it where `builds_root` has none.

    A failure is written beside where the library would be and is not tried again: delete that folder to.
    Raises: BuildFailure.
    """
    if not sys.platform.startswith("linux"):
        raise BuildFailure(f"the native kernels are built on Linux only, not on {sys.platform}")
    command = compiler()
    folder = builds_root() / build_key(command)
    library, failure = folder / LIBRARY, folder / FAILURE
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if failure.exists():
                raise BuildFailure(f"an earlier build failed, see {failure}; delete {folder} to try again")
            if not library.exists():
                _announce(folder)
                _compile(command, folder, library, failure)
    except OSError as error:
        raise BuildFailure(f"cache folder {folder}: {error.strerror}") from None
    return library


def _announce(folder: Path) -> None:
    sys.stderr.write(f"gatewright: building the native kernels, once for this machine ({folder})\n")


def _compile(command: str, folder: Path, library: Path, failure: Path) -> None:
    """Compile what has changed, link, and put the library in its place whole."""
    base = Path(torch.__file__).parent
    include = [f"-I{base / 'include'}", f"-I{base / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    headers = sorted(SOURCES.glob("*.h"))
    ready = folder.parent / "objects"
    ready.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as place:

        def object_of(source: Path) -> str:
            target = ready / f"{source.stem}-{_digest(command, [source, *headers])}.o"
            if not target.exists():
                made = Path(place) / f"{source.stem}.o"
                _run([command, *_flags(), abi, *include, "-c", str(source), "-o", str(made)], failure)
                os.replace(made, target)
            return str(target)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(object_of, sorted(SOURCES.glob("*.cpp"))))
        # Without -fopenmp here: the OpenMP that torch has loaded is found through torch's own library.
        made = Path(place) / LIBRARY
        link = [command, "-shared", *objects, "-o", str(made)]
        _run([*link, f"-L{base / 'lib'}", "-ltorch_cpu", "-lc10"], failure)
        os.replace(made, library)


def _run(call: list[str], failure: Path) -> None:
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        failure.write_text(f"{' '.join(call)}\n\n{done.stderr}", encoding="utf-8")
        first = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "no message")
        raise BuildFailure(f"{Path(call[0]).name} failed: {first.strip()} (all of it: {failure})")
