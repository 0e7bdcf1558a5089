"""A conversation: answers with the kept cache are those without one, and only what is new is read."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.backbones import LanguageModel
from gatewright.data import ByteTokenizer
from gatewright.errors import UserError
from gatewright.generation import Reader, Sampling, generate
from gatewright.generation.chat import Chat, ContextFull, talk, typed_lines
from gatewright.generation.opened import TextModel
from gatewright.generation.routing import NOTHING
from gatewright.generation.writing import Writing
from gatewright.papers import get_paper
from tests.test_generation import build

pytest.importorskip("transformers")

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}<a>"
QUESTIONS = ["one", "and two?", "3"]


def opened(model: Any, template: str | None = TEMPLATE) -> TextModel:
    """Return a model that writes printable letters only: what is encoded again is then what was drawn."""
    letters = torch.zeros(257, dtype=torch.bool)
    letters[32:127] = True
    with torch.no_grad():
        model.head.weight[~letters] = 0
    ends = frozenset({256})
    return TextModel(model, ByteTokenizer(), (256,), ends, template, {"eos_token": "END"}, step=1)


def recurrent() -> LanguageModel:
    torch.manual_seed(4)
    file = get_paper("sparsely_gated")
    return file.build(dataclasses.replace(file.Settings(), context=512)).eval()


def from_scratch(text_model: TextModel, messages: list[dict[str, str]], count: int) -> str:
    """Return the answer to a conversation that is read whole, without a cache."""
    said = "".join(f"<{m['role'][0]}>{m['content']}\n" for m in messages) + "<a>"
    ids = [256, *said.encode()]
    more = {"temperature": 0, "stop": [256], "cache": False}
    return bytes(generate(text_model.model, ids, max_new_tokens=count, **more)).decode()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["attention", "lstm"])
def test_answers_are_those_of_the_whole_conversation_and_only_what_is_new_is_read(kind: str):
    model = opened(build(context=512) if kind == "attention" else recurrent())
    chat = Chat(model, sampling=Sampling(temperature=0), writing=Writing(9), system="be brief")
    messages = [{"role": "system", "content": "be brief"}]
    for number, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        passed = chat.reader.passed
        turn = chat.ask(question)
        assert turn.assistant == from_scratch(model, messages, 9)
        assert len(set(turn.assistant)) > 1
        # The first reads all; later ones "\n<u>QUESTION\n<a>" and the last letter of the answer before.
        new = len(f"\n<u>{question}\n<a>") + 1
        whole = 1 + len(f"<s>be brief\n<u>{question}\n<a>")
        assert turn.read_tokens == (whole if number == 0 else new)
        # Each letter but the last of an answer is read too, in the pass that draws the next.
        assert chat.reader.passed - passed == turn.read_tokens + turn.new_tokens - 1
        messages.append({"role": "assistant", "content": turn.assistant})
    assert chat.messages == messages


def test_a_conversation_that_changed_is_read_from_where_it_changed():
    model = opened(build(context=512))
    chat = Chat(model, sampling=Sampling(temperature=0), writing=Writing(9, stop=("<",)), system="be brief")
    chat.ask("one")
    # What follows is another conversation; the first 1 + len("<s>be brief\n<u>") ids are the same.
    chat.begin_anew()
    other = chat.ask("two")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]
    assert other.assistant == from_scratch(model, messages, 9).partition("<")[0]
    assert other.read_tokens == len("two\n<a>")
    chat.begin_anew()
    assert chat.ask("two").read_tokens == 1


def test_each_turn_draws_its_own_numbers_and_a_seed_repeats_them():
    model = opened(build(context=512))
    said = [Chat(model, sampling=Sampling(seed=seed), writing=Writing(8)) for seed in (5, 5, 6)]
    first, again, other = ([chat.ask("x").assistant for _ in range(2)] for chat in said)
    assert first == again != other
    texts = generate(model.model, [256, *b"<u>x\n<a>"], max_new_tokens=8, seed=5, stop=[256])
    assert first[0] == ByteTokenizer().decode(texts)
    alone = Chat(model, sampling=Sampling(seed=5), writing=Writing(8))
    alone.turns = 1
    assert alone.ask("x").assistant != first[0]


def test_ctrl_c_ends_the_answer_and_not_the_conversation():
    model = opened(build(context=512))
    letters: list[str] = []

    def show(piece: str) -> None:
        letters.append(piece)
        if len(letters) == 4:
            raise KeyboardInterrupt

    chat = Chat(model, sampling=Sampling(temperature=0), writing=Writing(9), interruptible=True)
    turn = chat.ask("one", show)
    assert (turn.end, turn.assistant) == ("interrupted", "".join(letters))
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": turn.assistant}]
    messages.append({"role": "user", "content": "two"})
    assert chat.ask("two").assistant == from_scratch(model, messages, 9)
    # With its routing shown, an answer comes whole: then as far as it went.
    seen: list[str] = []
    letters.clear()
    routed = Chat(model, writing=Writing(9, show_routing=True), interruptible=True)
    turn = routed.ask("one", seen.append, show)
    assert (turn.end, seen, len(turn.assistant)) == ("interrupted", [turn.assistant], 4)
    letters.clear()
    with pytest.raises(KeyboardInterrupt):
        Chat(model, writing=Writing(9)).ask("one", show)


@pytest.mark.parametrize("kind", ["attention", "lstm"])
def test_a_pass_that_is_interrupted_leaves_no_half_read_token(kind: str):
    model: Any = build(context=512) if kind == "attention" else recurrent()
    text = torch.tensor([[256, *b"abcdef"]])
    reader, whole = Reader(model, 1, 16), Reader(model, 1, 16)
    reader.read(text[:, :4])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    # When the first layer's cache or state is a token ahead of the last layer's.
    hook = model.layers[0 if kind == "attention" else 1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        reader.read(text[:, :5])
    hook.remove()
    torch.testing.assert_close(reader.read(text), whole.read(text))


def test_a_full_context_is_a_clear_line():
    model = opened(build(context=32))
    chat = Chat(model, sampling=Sampling(temperature=0), writing=Writing(99))
    # An end of text and "<u>1234567890\n<a>" are 18 of 32 tokens.
    turn = chat.ask("1234567890")
    assert (turn.end, turn.new_tokens) == ("context", 14)
    before = list(chat.messages)
    with pytest.raises(ContextFull, match=r"the conversation has 43 tokens, and the model a context of 32"):
        chat.ask("abc")
    assert chat.messages == before
    chat.begin_anew()
    assert chat.ask("abc").end == "context"


def test_talking_line_by_line():
    model = opened(build(context=64))
    shown: list[str] = []
    told: list[str] = []
    chat = Chat(model, sampling=Sampling(temperature=0), writing=Writing(5, show_routing=True))
    lines = ["abc\n", "  \n", "/new\r\n", "abc\n", "x" * 80, "abc"]
    turns, full = talk(chat, lines, shown.append, told.append, interactive=True)
    assert full == ""
    assert [turn.user for turn in turns] == ["abc", "abc", "abc"]
    assert turns[0].assistant == turns[1].assistant
    assert "".join(shown) == "".join(f"{turn.assistant}\n" for turn in turns)
    assert "a new conversation" in told
    assert [line for line in told if line.startswith("the conversation has 104 tokens")]
    assert [len(turn.routing["tokens"]) for turn in turns if turn.routing] == [5, 5, 5]
    # Piped, "/new" is a question, and what does not fit ends the conversation.
    piped = Chat(model, writing=Writing(5))
    turns, full = talk(piped, ["/new", "x" * 80, "abc"], str, str)
    assert [turn.user for turn in turns] == ["/new"]
    assert full.startswith("the conversation has")


def test_a_dense_model_says_that_there_is_no_routing():
    told: list[str] = []
    chat = Chat(opened(build(moe_layers="none", width=48)), writing=Writing(2, show_routing=True))
    turns, _ = talk(chat, ["abc"], str, told.append)
    assert (told, turns[0].routing) == ([NOTHING], None)


def test_typed_lines_end_with_the_input():
    screen = io.StringIO()
    assert [*typed_lines(io.StringIO("a\nb\n"), screen)] == ["a\n", "b\n"]
    assert screen.getvalue() == "> > > \n"


def test_a_model_without_a_template_is_a_clear_line(tmp_path: Path):
    model = opened(build(), template=None)
    with pytest.raises(UserError, match=r"no chat template: .*--template FILE"):
        Chat(model)
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    assert Chat(model, template=file).ask("a").user == "a"
    with pytest.raises(UserError, match=r"nothing\.jinja cannot be read"):
        Chat(model, template=tmp_path / "nothing.jinja")


@pytest.mark.parametrize("paper", ["mixtral", "deepseek_v2"])
def test_a_cache_grows_and_keeps_what_it_holds(paper: str):
    torch.manual_seed(5)
    file = get_paper(paper)
    model = file.build(file.Settings()).eval()
    text = torch.tensor([[256, *b"a longer text than there was room for"]])
    grown, whole = Reader(model, 1, 4), Reader(model, 1, 128)
    grown.go_on_with(text[:, :4], 4)
    grown.read(text[:, :4])
    assert grown.go_on_with(text, 40) == 4
    assert grown.capacity == 40
    torch.testing.assert_close(grown.read(text), whole.read(text))
