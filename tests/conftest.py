"""Shapes and types of kernels, parts and backbones are checked in every test run (and only there)."""

from __future__ import annotations

import os

# Before torch is imported: many small tests are faster on one thread, and two runs do not fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: whatever was set, one thread each
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

from gatewright.places import cache_root

# Tests give themselves caches of their own; the kernels, a minute's build, are built once for all of them.
os.environ.setdefault("GATEWRIGHT_NATIVE_CACHE", str(cache_root() / "native"))

CHECKED = ("gatewright.kernels", "gatewright.parts", "gatewright.backbones")
install_import_hook(CHECKED, "beartype.beartype")
