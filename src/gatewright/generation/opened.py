"""A model that continues texts, opened from a run, from a folder of transformers, or from a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewright.backbones import LanguageModel
from gatewright.conversion import from_hf
from gatewright.conversion.chat_template import ChatTemplate, end_ids, folder_template
from gatewright.conversion.gguf_file import read_gguf
from gatewright.data import JsonTokenizer, Tokenizer
from gatewright.data.pretrained import SMOLLM2_NAMES, smollm2_file
from gatewright.data.tokenizer import beginning_of_text, tokenizer_from_json
from gatewright.errors import UserError
from gatewright.loading import load
from gatewright.parts import quantise_experts
from gatewright.training.checks import resolve_device
from gatewright.training.load import load_run


@dataclass(frozen=True)
class Opening:
    """Which of a model's weights are read, and where it runs."""

    averaged: bool = False
    """of a run of ours: the averaged weights instead of the live ones"""
    int8_experts: bool = False
    """read the experts' weights in int8"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    device: str = "cpu"
    """cpu, cuda, or cuda:N"""


@dataclass(frozen=True)
class TextModel:
    """A model that is ready to continue texts: `start` ids stand before one, an id of `ends` is behind it.
    `template` is its chat template and `special` the texts of special tokens; `step` is a run's.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    start: tuple[int, ...]
    ends: frozenset[int]
    template: str | None = None
    special: dict[str, str] | None = None
    step: int | None = None

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is to be continued."""
        ids = [*self.start, *self.tokenizer.encode(text).tolist()]
        # A model needs something to read: where nothing begins a text, the end of one does.
        return ids or [min(self.ends, default=0)]

    def conversation(self, ids: list[int]) -> list[int]:
        """Return a conversation's ids with what stands before a text of a run; other templates write it."""
        return ids if self.step is None else [*self.start, *ids]

    def chat_template(self, file: Path | None = None) -> ChatTemplate:
        """Return the chat template, that of a file in place of the model's own. Raises: UserError without."""
        source = self.template if file is None else _read(file)
        if source is None:
            raise UserError(
                "this model has no chat template: it was not trained on conversations; allowed: --template "
                "FILE, a Jinja template; or continue texts with `gatewright generate`"
            )
        if isinstance(self.tokenizer, JsonTokenizer):
            return ChatTemplate(source, tokenizer=self.tokenizer.inner_json(), special=self.special)
        encode: Callable[[str], Any] = self.tokenizer.encode
        return ChatTemplate(source, encode=encode, special=self.special)


def open_text_model(given: str, opening: Opening) -> TextModel:
    """Return the model of a run's folder, of a folder of transformers, of a GGUF file, or "smollm2".

    Raises: UserError for anything else, saying what is missing.
    """
    path = smollm2_file() if given in SMOLLM2_NAMES else Path(given)
    is_run = (path / "run.toml").exists()
    if is_run or not (path.suffix == ".gguf" or (path / "config.json").is_file()):
        return _open_run(path, opening)
    if opening.averaged:
        raise UserError(
            "--averaged of a model that is no run of ours; allowed: its own weights; leave it out"
        )
    found = _open_gguf(path) if path.suffix == ".gguf" else _open_folder(path)
    if opening.int8_experts:
        quantise_experts(found.model)
    found.model.to(resolve_device(opening.device)).eval()
    return found


def _open_run(path: Path, opening: Opening) -> TextModel:
    more = {"averaged": opening.averaged, "int8_experts": opening.int8_experts}
    loaded = load_run(path, device=opening.device, **more)
    model: Any = loaded.model
    eot = loaded.tokenizer.eot
    special = {"eos_token": loaded.tokenizer.pieces([eot])[0]}
    return TextModel(model, loaded.tokenizer, (eot,), frozenset({eot}), special=special, step=loaded.step)


def _open_gguf(path: Path) -> TextModel:
    held = read_gguf(path)
    model: Any = from_hf(held.config, held.tensors)
    tokenizer = tokenizer_from_json(held.tokenizer, held.name)
    ends = frozenset({*held.ends, tokenizer.eot})
    return TextModel(model, tokenizer, held.start, _known(ends, model), held.template, held.special)


def _open_folder(path: Path) -> TextModel:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; allowed: a checkpoint with its tokenizer.json; put it there")
    model: Any = load(path)
    tokenizer = model.origin.tokenizer
    template, special = folder_template(path)
    ends = frozenset({*end_ids(path), tokenizer.eot})
    return TextModel(model, tokenizer, beginning_of_text(file), _known(ends, model), template, special)


def _known(ends: frozenset[int], model: LanguageModel) -> frozenset[int]:
    """Return the ids that the model has: a tokenizer without an end of text is given one beyond its last."""
    return frozenset(end for end in ends if end < model.vocab_size)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--template {file} cannot be read ({error}); allowed: a Jinja template file"
        ) from None
