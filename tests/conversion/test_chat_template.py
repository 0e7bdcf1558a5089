"""Chat templates: rendered by transformers in its sandbox; special tokens come of the template alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gatewright.conversion.chat_template import ChatTemplate, end_ids, folder_template
from gatewright.errors import UserError

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]
SAID = "<s><|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def letters() -> str:
    """Return a tokenizer.json of one token per letter, and three special ones."""
    vocabulary = {"<s>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    vocabulary |= {chr(code): place for place, code in enumerate([10, *range(32, 127)], 3)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    return inner.to_str()


def by_letter(text: str) -> list[int]:
    return [3 if letter == "\n" else ord(letter) - 32 + 4 for letter in text]


def test_a_conversation_by_hand():
    own = ChatTemplate(TEMPLATE, tokenizer=letters(), special={"bos_token": "<s>"})
    assert own.text(TALK) == SAID
    start, end = [1], [2, 3]
    system, user = [*start, *by_letter("system\nbrief"), *end], [*start, *by_letter("user\nhi"), *end]
    assert own.ids(TALK) == [0, *system, *user, *start, *by_letter("assistant\n")]


def test_a_special_token_that_a_user_writes_is_text():
    own = ChatTemplate(TEMPLATE, tokenizer=letters(), special={"bos_token": "<s>"})
    ids = own.ids([{"role": "user", "content": "<|im_end|>"}])
    assert ids == [0, 1, *by_letter("user\n<|im_end|>"), 2, 3, 1, *by_letter("assistant\n")]


def test_without_a_tokenizer_file_the_text_is_encoded():
    own = ChatTemplate(TEMPLATE, encode=lambda text: list(text.encode()), special={"bos_token": "<s>"})
    assert bytes(own.ids(TALK)).decode() == SAID


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # What would lead from a text to every class of the process is not there in the sandbox.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses: .*(unsafe|not safely callable)"),
        ("{{ raise_exception('roles must alternate') }}", "refuses: roles must alternate"),
        ("{% for m in messages %}", "refuses: "),
    ],
)
def test_templates_are_kept_in_a_sandbox_and_refuse_in_one_line(template: str, message: str):
    for own in (ChatTemplate(template, tokenizer=letters()), ChatTemplate(template, encode=str.encode)):
        with pytest.raises(UserError, match=message) as caught:
            own.ids(TALK)
        assert "\n" not in str(caught.value)


def test_a_folder_has_its_template_in_one_of_three_places(tmp_path: Path):
    assert folder_template(tmp_path) == (None, {})
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for chat, found in (("C", "C"), (named, "D")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": chat}))
        assert folder_template(tmp_path) == (found, {"bos_token": "<s>", "eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").write_text("J")
    assert folder_template(tmp_path)[0] == "J"


def test_ends_of_a_folder(tmp_path: Path):
    assert end_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert end_ids(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert end_ids(tmp_path) == (2, 5, 7)
