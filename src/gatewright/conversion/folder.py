"""A checkpoint folder of transformers, opened from the disk alone: its model, or a line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gatewright.errors import UserError

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
_ALLOWED = "a folder that save_pretrained wrote, with config.json and safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder. Raises: UserError where there is none."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "holds no config.json" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"{folder} {what}; allowed: {_ALLOWED}; check the path") from None
    if not isinstance(found, dict):
        raise UserError(f"config.json of {folder} is no mapping; allowed: {_ALLOWED}; check the path")
    return found


def load_folder(folder: str | Path, *, dtype: str = "auto", device: str = "cpu", trust: bool = False) -> Any:
    """Return the model of a transformers checkpoint folder, in evaluation mode. Asks no network.

    Args: `dtype` "auto" (the checkpoint's own), "fp32" or "bf16"; `trust` lets the folder's own code and
    pickled weights run, which may do anything that you may do.
    Raises: UserError for a folder without safetensors, with code of its own, or whose weights are not all
    those of the model: an untrained router would be shown as if it were trained.
    """
    folder = Path(folder)
    config = read_config(folder)
    _refuse_unsafe(folder, config, trust)
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers 5 is not installed; allowed: transformers>=5.23,<6; pip install 'gatewright[hf]'"
        ) from None
    names = config.get("architectures") or [""]
    kind: Any = getattr(transformers, str(names[0]), None) or transformers.AutoModelForCausalLM
    own = {} if DTYPES[dtype] is None else {"dtype": DTYPES[dtype]}
    remote = {"trust_remote_code": True} if trust else {}
    if trust and config.get("auto_map"):
        kind = transformers.AutoModelForCausalLM
    try:
        model, about = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=None if trust else True,
            output_loading_info=True,
            **own,
            **remote,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformers cannot load {folder}: {reason[:300]}; allowed: {_ALLOWED}, of a family that "
            "transformers knows"
        ) from None
    missing = sorted(about["missing_keys"]) + sorted(str(key) for key in about.get("mismatched_keys", ()))
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}, ...), which "
            f"would be random; allowed: whole checkpoints; check the folder"
        )
    ready: nn.Module = model.to(device).eval()
    return ready


def _refuse_unsafe(folder: Path, config: dict[str, Any], trust: bool) -> None:
    """Raise UserError for a folder that would run code when it is loaded, unless that is trusted."""
    if trust:
        return
    if config.get("auto_map"):
        raise UserError(
            f"{folder} brings code of its own (auto_map in config.json), which loading would run; allowed: "
            "families that transformers has; --trust runs it, if you trust whoever wrote it"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    held = f"only pickled weights ({pickles[0]}), which can run code" if pickles else "no weights"
    raise UserError(
        f"{folder} holds {held}; allowed: *.safetensors; convert them"
        + ("; --trust loads them, if you trust whoever wrote them" if pickles else ", or check the path")
    )


def context_of(model: Any, wanted: int) -> int:
    """Return how many tokens the model reads at once: `wanted`, or fewer where it has fewer positions."""
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    most = getattr(config, "max_position_embeddings", None)
    return min(wanted, int(most)) if most else wanted


def vocabulary_of(model: Any) -> int:
    """Return how many token ids the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])
