"""Flags and TOML keys reach the settings by one door, and every mistake is one line with the way out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from gatewright.cli.parse import allowed, read_toml, settings_from, settings_table, split_common, take_words
from gatewright.cli.run import HelpAsked
from gatewright.errors import UserError


@dataclass(frozen=True)
class Run:
    """How to train."""

    data: tuple[Path, ...] = ()
    """files and folders"""
    learning_rate: float = 1e-3
    """peak rate"""
    resume: bool = False
    against: Literal["active", "total"] = "active"
    minutes: float | None = None
    fractions: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Model:
    """A toy model."""

    num_experts: int | tuple[int, ...] = 64
    num_selected: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.num_experts, int) and self.num_selected > self.num_experts:
            raise ValueError(f"num_selected {self.num_selected} > num_experts {self.num_experts}; lower it")


def parse(*argv: str, toml: Path | None = None) -> tuple[Run, Model]:
    run, model = settings_from(argv, Run, Model, prog="gatewright train", toml=toml, hidden=["paper"])
    return run, model


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    assert "╭" not in line
    return line


def test_no_flags_gives_the_defaults():
    assert parse() == (Run(), Model())


def test_an_instance_in_place_of_a_class_sets_the_defaults():
    base = Run(learning_rate=0.5, minutes=2.0)
    (run,) = settings_from(["--learning-rate", "0.25"], base, prog="gatewright train")
    assert run == Run(learning_rate=0.25, minutes=2.0)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--num-experts 8", "num_experts", 8),
        ("--num-experts=8", "num_experts", 8),
        ("--num_experts 8", "num_experts", 8),
        ("--num-experts 8 16", "num_experts", (8, 16)),
        ("--num-experts 8,16", "num_experts", (8, 16)),
        ("--num-experts=8,16", "num_experts", (8, 16)),
        ("--num-experts 8 --num-experts 16", "num_experts", 16),
        ("--learning-rate 3e-3", "learning_rate", 0.003),
        ("--learning-rate -1", "learning_rate", -1.0),
        ("--resume", "resume", True),
        ("--resume true", "resume", True),
        ("--resume --no-resume", "resume", False),
        ("--minutes 1.5", "minutes", 1.5),
        ("--minutes none", "minutes", None),
        ("--against total", "against", "total"),
        ("--fractions 0.01,0.1,1", "fractions", (0.01, 0.1, 1.0)),
        ("--data a,b c", "data", (Path("a,b"), Path("c"))),
    ],
)
def test_flags_become_values(words: str, field: str, value: object):
    run, model = parse(*words.split())
    got = getattr(run if hasattr(run, field) else model, field)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            "--learning-rat 3",
            ["--learning-rat;", "did you mean '--learning-rate'?", "gatewright train --help"],
        ),
        ("--qqqq 3", ["unknown flag --qqqq; `gatewright train --help` lists every flag"]),
        ("-l 3", ["unknown flag -l"]),
        ("--no-minutes", ["unknown flag --no-minutes"]),
        ("--learning-rate abc", ["--learning-rate abc", "allowed: a number"]),
        ("--learning-rate=", ["--learning-rate="]),
        ("--learning-rate", ["--learning-rate needs a value"]),
        ("--learning-rate 1 2", ["--learning-rate 1 2", "allowed: a number"]),
        ("--num-experts 4 x", ["--num-experts 4 x", "an integer, or one or more values, each an integer"]),
        ("--num-experts 4.5", ["--num-experts 4.5"]),
        ("--against nobody", ["--against nobody", "allowed: active or total"]),
        ("--resume yes", ["--resume yes", "true or false"]),
        ("--resume true again", ["'again' does not belong to a flag"]),
        ("stray", ["'stray' does not belong to a flag"]),
        ("--data", ["--data needs a value", "a path"]),
        ("--num-experts 2", ["num_selected 4 > num_experts 2; lower it"]),
    ],
)
def test_a_mistake_is_one_line(words: str, parts: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError) as error:
        parse(*words.split())
    line = one_line(error)
    assert [part for part in parts if part not in line] == [], line
    assert capsys.readouterr() == ("", "")


def test_cross_checks_see_all_flags_at_once():
    # Either flag alone would be refused by Model's own check or by its default.
    assert parse("--num-experts", "2", "--num-selected", "1")[1] == Model(2, 1)
    assert parse("--num-selected", "100", "--num-experts", "128")[1] == Model(128, 100)


def test_precedence_is_defaults_then_toml_then_flags(tmp_path: Path):
    text = (
        'paper = "switch"\nresume = true\n[run]\nlearning_rate = 3e-3\ndata = ["a", "b"]\nminutes = "none"\n'
    )
    path = written(tmp_path, text + "[model]\nnum_experts = [4, 8]\n")
    run, model = parse("--learning-rate", "5", toml=path)
    assert run == Run(data=(Path("a"), Path("b")), learning_rate=5.0, resume=True, minutes=None)
    assert model == Model((4, 8))


def test_toml_values_keep_their_meaning(tmp_path: Path):
    path = written(tmp_path, "data = []\nresume = false\nfractions = [0.5, 1]\nnum-selected = 3\n")
    run, model = parse("--resume", toml=path)
    assert (run.data, run.resume, run.fractions, model.num_selected) == ((), True, (0.5, 1.0), 3)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rat = 1", ["unknown key 'learning_rat'", "did you mean 'learning_rate'?", "--help"]),
        ("learning_rate = 'fast'", ["learning_rate = 'fast'", "allowed: a number"]),
        ("resume = 3", ["resume = 3", "true or false"]),
        ("learning_rate 1", ["not TOML", "line 1"]),
        ("[a]\nminutes = 1\n[b]\nminutes = 2", ["'minutes' is set twice"]),
    ],
)
def test_a_mistake_in_toml_is_one_line_that_names_the_file(tmp_path: Path, text: str, parts: list[str]):
    path = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        parse(toml=path)
    line = one_line(error)
    assert [part for part in [str(path), *parts] if part not in line] == [], line


def test_a_missing_toml_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.toml: no such file"):
        read_toml(tmp_path / "nowhere.toml")


def test_a_folder_in_place_of_a_toml_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="directory"):
        read_toml(tmp_path)


def test_two_settings_classes_may_not_share_a_flag():
    @dataclass(frozen=True)
    class Clash:
        minutes: int = 3

    with pytest.raises(TypeError, match="--minutes belongs to both Run and Clash"):
        settings_table([Run, Clash])


def test_common_flags_are_taken_out_wherever_they_stand():
    common, rest = split_common(["mixtral", "--json", "--num-experts", "4", "--from", "a.toml", "--x"])
    assert (common.json, common.debug, common.from_) == (True, False, Path("a.toml"))
    assert rest == ["mixtral", "--num-experts", "4", "--x"]
    common, rest = split_common(["--json", "mixtral", "--from=b.toml", "olmoe", "--help"])
    assert (common.json, common.from_, rest) == (True, Path("b.toml"), ["mixtral", "olmoe", "--help"])
    assert split_common(["--num-experts", "4", "8"])[1] == ["--num-experts", "4", "8"]


def test_leading_words_are_the_positional_ones():
    assert take_words(["olmoe", "x", "--a", "b"], 1) == (["olmoe"], ["x", "--a", "b"])
    assert take_words(["--a", "b"], 1) == ([], ["--a", "b"])
    assert take_words([], 2) == ([], [])


def test_help_lists_every_flag_with_its_default():
    with pytest.raises(HelpAsked) as page:
        parse("--help")
    text = str(page.value)
    assert text.startswith("usage: gatewright train")
    for words in (
        "How to train.",
        "A toy model.",
        "--num-experts",
        "files and folders",
        "--json",
        "--from ",
        "64",
    ):
        assert words in text, words
    assert "--from_" not in text
    assert "-h," not in text


def test_a_hidden_field_is_no_flag_and_its_key_is_skipped(tmp_path: Path):
    path = written(tmp_path, "minutes = 3\nresume = true\n")
    (run,) = settings_from([], Run, prog="gatewright train", toml=path, hidden=["minutes"])
    assert run == Run(resume=True)
    with pytest.raises(UserError, match="unknown flag --minutes"):
        settings_from(["--minutes", "3"], Run, prog="gatewright train", hidden=["minutes"])
    with pytest.raises(HelpAsked) as page:
        settings_from(["--help"], Run, prog="gatewright train", hidden=["minutes"])
    assert "--minutes" not in str(page.value)
    assert "--resume" in str(page.value)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "an integer, or none"),
        (Literal["a", "b"], "a or b"),
        (tuple[float, ...], "one or more values, each a number"),
        (bool, "true or false"),
    ],
)
def test_allowed_says_it_in_words(hint: object, words: str):
    assert allowed(hint) == words
