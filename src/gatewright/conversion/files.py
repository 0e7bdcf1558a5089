"""The tensors of a checkpoint folder, mapped from its files and read when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class TensorFiles(Mapping[str, Tensor]):
    """A mapping name -> tensor over a folder's *.safetensors: the one file, or those that the index names.

    Tensors are views of mapped files: what is not touched takes no memory. `trust` reads *.bin as well, by
    torch's own reader that runs no code.
    Raises: UserError for a folder without them, a file that is missing or broken, a name in no file.
    """

    def __init__(self, folder: Path, trust: bool = False) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        index = folder / INDEX
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if index.is_file():
            self._where = _index(index)
        elif safe := sorted(path.name for path in folder.glob("*.safetensors")):
            self._where = {name: file for file in safe for name in self._file(file).keys()}  # noqa: SIM118
        elif pickles and trust:
            self._where = {name: file for file in pickles for name in self._file(file)}
        else:
            held = f"{pickles[0]}, a pickle" if pickles else "no *.safetensors"
            raise UserError(
                f"{folder} holds {held}; allowed: *.safetensors"
                + ("; --trust reads it, if you trust whoever wrote it" if pickles else "; check the path")
            )
        for file in sorted(set(self._where.values())):
            missing = sorted(n for n, f in self._where.items() if f == file and n not in self._names(file))
            if missing:
                raise UserError(f"{folder / file} lacks {missing[0]}, which {INDEX} puts there; get it anew")

    def __getitem__(self, name: str) -> Tensor:
        file = self._where[name]
        opened = self._file(file)
        found: Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    @property
    def files(self) -> list[Path]:
        """The files, in order."""
        return [self.folder / name for name in sorted(set(self._where.values()))]

    def _names(self, file: str) -> set[str]:
        opened = self._file(file)
        return set(opened if isinstance(opened, dict) else opened.keys())

    def _file(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        if file not in self._open:
            if not path.is_file():
                raise UserError(f"{path} is missing; allowed: a whole checkpoint; get the file")
            try:
                if path.suffix == ".bin":
                    self._open[file] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                else:
                    self._open[file] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError, RuntimeError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"{path} cannot be read ({reason}); allowed: a whole file; get it anew"
                ) from None
        return self._open[file]


def _index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read; allowed: an index with a weight_map; get it anew") from None
    # A name with a folder in it could lead out of this one.
    wrong = [file for file in found.values() if Path(file).name != file]
    if wrong:
        raise UserError(f"{path} names {wrong[0]}; allowed: files of this folder")
    return {str(name): str(file) for name, file in found.items()}
