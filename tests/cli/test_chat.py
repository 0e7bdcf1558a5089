"""`gatewright chat` and `generate` on a small model of a GGUF file: piped, typed, whole, and refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from gatewright.cli import main

small = pytest.importorskip("tests.conversion.small_gguf", exc_type=ImportError)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small.write(tmp_path_factory.mktemp("gguf") / "small.gguf", small.llama())


@pytest.fixture(autouse=True)
def own_allocator(monkeypatch):
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def call(monkeypatch, capsys, stdin: io.StringIO, *argv: str | Path) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", stdin)
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_piped_lines_are_turns_and_json_has_them_whole(model: Path, monkeypatch, capsys):
    argv = ["chat", model, "--max-new-tokens", "6", "--temperature", "0", "--system", "be brief"]
    code, out, err = call(monkeypatch, capsys, io.StringIO("hello\nand now?\n"), *argv)
    assert (code, err) == (0, "")
    code, whole, err = call(monkeypatch, capsys, io.StringIO("hello\nand now?\n"), *argv, "--json")
    result = json.loads(whole)
    assert (code, err) == (0, "")
    assert [turn["user"] for turn in result["turns"]] == ["hello", "and now?"]
    assert out == "".join(f"{turn['assistant']}\n" for turn in result["turns"])
    assert result["system"] == "be brief"
    # The second turn reads a part of the conversation only.
    assert result["turns"][1]["read_tokens"] < result["turns"][0]["read_tokens"] + 6


def test_typed_lines_have_a_prompt_and_a_new_conversation(model: Path, monkeypatch, capsys):
    keys = Keyboard("hello\n/new\nhello\n")
    argv = ["chat", model, "--max-new-tokens", "4", "--temperature", "0"]
    code, out, err = call(monkeypatch, capsys, keys, *argv)
    assert code == 0
    assert err == "> > a new conversation\n> > \n"
    first, second = out[: len(out) // 2], out[len(out) // 2 :]
    assert first == second


def test_a_full_context_ends_a_piped_conversation_with_what_there_is(model: Path, monkeypatch, capsys):
    long = io.StringIO(f"hello\n{'x' * 300}\nhello\n")
    code, out, err = call(monkeypatch, capsys, long, "chat", model, "--max-new-tokens", "3", "--json")
    assert code == 2
    assert len(json.loads(out)["turns"]) == 1
    assert "tokens, and the model a context of 256; allowed: fewer" in err
    assert err.count("\n") == 1


def test_a_template_file_replaces_the_models_own(model: Path, tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    argv = ["chat", model, "--template", file, "--json", "--max-new-tokens", "1"]
    code, out, _ = call(monkeypatch, capsys, io.StringIO("the\n"), *argv)
    assert (code, json.loads(out)["turns"][0]["read_tokens"]) == (0, 1)
    file.write_text("{{ raise_exception('no system here') }}")
    code, out, err = call(monkeypatch, capsys, io.StringIO("the\n"), *argv)
    assert (code, out) == (2, "")
    assert "the chat template refuses: no system here" in err


def test_generate_takes_a_gguf_file(model: Path, monkeypatch, capsys):
    argv = ["generate", model, "--prompt", "the", "--max-new-tokens", "8", "--seed", "3", "--show-routing"]
    code, out, err = call(monkeypatch, capsys, io.StringIO(), *argv)
    assert code == 0
    assert err == "this model is dense: no token chooses experts, so there is no routing to show\n"
    code, whole, _ = call(monkeypatch, capsys, io.StringIO(), *argv, "--json")
    result = json.loads(whole)
    assert out == f"the{result['text']}\n"
    assert (result["routing"], result["step"]) == (None, None)
    text = result["text"]
    stop = next(text[i : i + 2] for i in range(1, len(text)) if text.index(text[i : i + 2]) == i)
    code, whole, _ = call(monkeypatch, capsys, io.StringIO(), *argv, "--json", "--stop", stop)
    stopped = json.loads(whole)
    assert (stopped["text"], stopped["end"]) == (text.partition(stop)[0], "stop")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["chat"], "MODEL is missing"),
        (["chat", "{}/nothing"], "holds no run"),
        (["chat", "{}/nothing.gguf"], "nothing.gguf is no file"),
        (["generate", "{}/small.gguf", "--averaged"], "--averaged of a model that is no run"),
        (["generate", "{}/small.gguf", "--stop", ""], "an empty stop text"),
        (["generate", "{}/small.gguf", "--min-p", "2"], "min_p 2.0; allowed: 0"),
        (["generate", "{}/small.gguf", "--int8-experts"], "a model without an MoELayer"),
    ],
)
def test_mistakes_are_one_line(model: Path, monkeypatch, capsys, argv: list[str], line: str):
    given = [word.replace("{}", str(model.parent)) for word in argv]
    code, out, err = call(monkeypatch, capsys, io.StringIO("hello\n"), *given)
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1


def test_help_names_the_options_of_the_field(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, io.StringIO(), "chat", "--help")
    assert code == 0
    for flag in ("--system", "--template", "--stop", "--min-p", "--repetition-penalty", "--show-routing"):
        assert flag in out
