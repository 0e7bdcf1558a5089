"""Conversations as a model reads them: its chat template, run by transformers in its sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewright.errors import UserError

Message = Mapping[str, str]
_ALLOWED = "a Jinja template over messages, as transformers' apply_chat_template takes it"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A template and what encodes the text that it makes.

    Args: `source` is the template; `tokenizer` the text of a tokenizer.json, whose special tokens are ids
    where the template writes them, and text where somebody else does; `encode` takes its place for a
    tokenizer without such a file. `special` are the texts of special tokens, by transformers' names for them.
    Raises: UserError without transformers.
    """

    def __init__(
        self,
        source: str,
        *,
        tokenizer: str | None = None,
        special: Mapping[str, str] | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self.source, self.special = source, dict(special or {})
        self._encode = encode
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            raise UserError(
                "transformers 5 is not installed, which runs chat templates; allowed: transformers>=5.23,<6; "
                "pip install 'gatewright[hf]'"
            ) from None
        self._tokenizer: Any = None
        if tokenizer is not None:
            from tokenizers import Tokenizer

            self._tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(tokenizer), **self.special
            )

    def text(self, messages: Sequence[Message]) -> str:
        """Return a conversation as the model reads it, up to where its answer begins.

        Raises: UserError where the template refuses the messages, is no template, or leaves its sandbox.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        def render() -> str:
            more: dict[str, Any] = {"add_generation_prompt": True, **self.special}
            talk: list[Any] = [[dict(one) for one in messages]]
            found: Any = render_jinja_template(talk, chat_template=self.source, **more)
            return str(found[0][0])

        return _refused(render)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of `text`. Raises: as it does."""
        if self._tokenizer is None:
            assert self._encode is not None
            return [int(i) for i in self._encode(self.text(messages))]

        def render() -> list[int]:
            found = self._tokenizer.apply_chat_template(
                [dict(one) for one in messages],
                chat_template=self.source,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
            return [int(i) for i in found]

        return _refused(render)


def _refused(render: Callable[[], Any]) -> Any:
    """Return what `render` does; a template's error becomes a line."""
    from jinja2 import TemplateError

    try:
        return render()
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the chat template refuses: {reason[:200]}; allowed: {_ALLOWED}") from None


def folder_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Return the chat template of a checkpoint folder, None where it has none, and its special tokens."""
    config = _json(folder / "tokenizer_config.json")
    own = folder / "chat_template.jinja"
    found = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    if isinstance(found, list):
        named = {one["name"]: one["template"] for one in found}
        found = named.get("default", next(iter(named.values()), None))
    special = {name: _content(config[name]) for name in _SPECIAL if config.get(name)}
    return found, special


def end_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a text or an answer of a checkpoint folder's model."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get("eos_token_id")
        found |= {int(one) for one in (value if isinstance(value, list) else [value]) if one is not None}
    return tuple(sorted(found))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
