"""From command line and TOML to settings: one door, so that a typo in either gets the same one-line answer.

Precedence: a dataclass's defaults < the TOML file given by --from < flags. tyro converts the values and
writes the help; finding the flag, and saying in one line what is wrong with it, happens here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, did_you_mean
from .manual import help_text, is_hidden
from .run import Common, HelpAsked, flag

NUMBER = re.compile(r"-\.?\d")


class Setting(NamedTuple):
    """One field of one dataclass, as a flag."""

    owner: type
    field: str
    hint: Any


class Given(NamedTuple):
    """One flag as it was given: its setting, its values, and how to speak of it in a message."""

    setting: Setting
    values: list[str]
    spoken: str
    empty_ok: bool = False


def settings_table(owners: Iterable[type], hidden: Sequence[str] = ()) -> dict[str, Setting]:
    """Return every flag of the dataclasses, less the hidden ("field" or "Class.field").

    Raises TypeError when two of them claim the same word.
    """
    table: dict[str, Setting] = {}
    for owner in owners:
        hints = typing.get_type_hints(owner, include_extras=True)
        for field in dataclasses.fields(owner):
            if not field.init or is_hidden(owner, field.name, hidden):
                continue
            name = flag(field.name)
            if name in table:
                raise TypeError(f"--{name} belongs to both {table[name].owner.__name__} and {owner.__name__}")
            table[name] = Setting(owner, field.name, hints[field.name])
    return table


def settings_from(
    argv: Sequence[str],
    *owners: Any,
    prog: str,
    toml: Path | None = None,
    words: str = "",
    hidden: Sequence[str] = (),
    intro: str = "",
) -> tuple[Any, ...]:
    """Return one settings object per owner, from a TOML file and flags.

    Args:
        owners: frozen dataclasses, or instances of them, which then are the defaults.
        prog: the command as the user typed it ("gatewright train"); every message points to its --help.
        words: what the command takes beside flags, for the help's first line ("[PATH...]").
        toml: file read before the flags; tables in it only group, keys are field names or flags.
        hidden: fields ("paper", or "Settings.context") that the command fills itself: no flags; a key
            of that name is skipped in the file.
        intro: what --help says before the flags.

    Raises:
        UserError: unknown flag or key, missing or wrong value, or what a dataclass's own check refuses.
        HelpAsked: with the help text, for --help.
    """
    bases = [owner() if isinstance(owner, type) else owner for owner in owners]
    table = settings_table([type(base) for base in bases], hidden)
    if "--help" in argv or "-h" in argv:
        raise HelpAsked(help_text(bases, f"{prog} {words}".strip(), hidden, intro))
    given = [*(_from_toml(toml, table, prog, hidden) if toml else ()), *_from_flags(argv, table, prog)]
    changes: dict[type, dict[str, Any]] = {type(base): {} for base in bases}
    for item in given:
        changes[item.setting.owner][item.setting.field] = _convert(item, prog)
    return tuple(_rebuilt(base, changes[type(base)]) for base in bases)


def split_common(argv: Sequence[str]) -> tuple[Common, list[str]]:
    """Return the flags of every command, and the rest of the line (where --help stays)."""
    table = settings_table([Common])
    mine: list[str] = []
    rest: list[str] = []
    place = rest
    for word in argv:
        if word.startswith("--"):
            setting = table.get(word[2:].partition("=")[0])
            place = mine if setting else rest
            place.append(word)
            # A switch takes no value: what follows it belongs to the rest ("--json mixtral").
            if setting is None or "=" in word or setting.hint is bool:
                place = rest
        else:
            place.append(word)
            place = rest
    (common,) = settings_from(mine, Common, prog="gatewright")
    return common, rest


def take_words(argv: Sequence[str], most: int) -> tuple[list[str], list[str]]:
    """Return up to `most` leading words that are not flags, and the rest."""
    count = 0
    while count < min(most, len(argv)) and not argv[count].startswith("-"):
        count += 1
    return list(argv[:count]), list(argv[count:])


def the_word(argv: Sequence[str], prog: str, name: str, what: str) -> tuple[str, list[str]]:
    """Return the one leading word that a command needs, and the rest. Raises UserError when it is missing."""
    words, rest = take_words(argv, most=1)
    if not words and "--help" not in argv and "-h" not in argv:
        raise UserError(f"{prog} {name}: {name} is missing; give {what}; see `{prog} --help`")
    return (words or [""])[0], rest


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's keys; tables only group. Raises UserError: no such file, not TOML, a key twice."""
    import tomllib

    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--from {path}: no such file; give a TOML file such as a run's run.toml") from None
    except OSError as error:
        raise UserError(f"--from {path}: {error.strerror}; give a readable TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--from {path}: not TOML ({error}); write lines such as num_experts = 64") from None
    flat: dict[str, Any] = {}
    todo = [tree]
    while todo:
        for key, value in todo.pop(0).items():
            if isinstance(value, dict):
                todo.append(value)
            elif flag(key) in map(flag, flat):
                raise UserError(f"--from {path}: {key!r} is set twice; keep one of them")
            else:
                flat[key] = value
    return flat


def _from_toml(path: Path, table: dict[str, Setting], prog: str, hidden: Sequence[str]) -> list[Given]:
    given = []
    for key, value in read_toml(path).items():
        if flag(key) in map(flag, hidden):
            continue
        setting = table.get(flag(key))
        if setting is None:
            near = _near(key.replace("-", "_"), [known.replace("-", "_") for known in table])
            raise UserError(f"{path}: unknown key {key!r}; {near}`{prog} --help` lists every setting")
        words = [_word(item) for item in _listed(value)]
        given.append(Given(setting, words, f"{path}: {key} = {value!r}", empty_ok=value == []))
    return given


def _near(given: str, known: list[str]) -> str:
    """Return "did you mean 'x'? " or nothing."""
    return did_you_mean(given, known).removeprefix("; ").replace("?", "? ")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_flags(argv: Sequence[str], table: dict[str, Setting], prog: str) -> list[Given]:
    given: list[Given] = []
    for word in argv:
        if word.startswith("-") and not NUMBER.match(word):
            name, has_value, value = word.removeprefix("--").partition("=")
            name = flag(name)
            setting = table.get(name)
            if setting is None and name.startswith("no-") and _is_switch(table.get(name[3:])):
                setting, has_value, value = table[name[3:]], "=", "false"
            if setting is None or not word.startswith("--"):
                near = _near(f"--{name}", [f"--{known}" for known in [*table, *settings_table([Common])]])
                raise UserError(
                    f"unknown flag {word.partition('=')[0]}; {near}`{prog} --help` lists every flag"
                )
            given.append(Given(setting, [value] if has_value else [], word))
        elif not given or (_is_switch(given[-1].setting) and given[-1].values):
            raise UserError(f"{word!r} does not belong to a flag; `{prog} --help` shows what goes where")
        else:
            given[-1].values.append(word)
            given[-1] = given[-1]._replace(spoken=f"{given[-1].spoken} {word}")
    return given


def _is_switch(setting: Setting | None) -> bool:
    return setting is not None and setting.hint is bool


def _convert(item: Given, prog: str) -> Any:
    """Return the value of one flag, converted by tyro; raises UserError with what is allowed."""
    setting, values = item.setting, item.values
    if setting.hint is bool:
        switch = {"": True, "true": True, "false": False}.get(" ".join(values).lower())
        if switch is None:
            raise _refused(item, prog)
        return switch
    if not values and not item.empty_ok:
        raise _refused(item, prog)
    if _numbers_in_a_row(setting.hint):
        values = [part for value in values for part in value.split(",") if part]
    if _allows_none(setting.hint):
        values = ["None" if value.lower() == "none" else value for value in values]
    import tyro

    shadow: Any = dataclasses.make_dataclass("Shadow", [("value", setting.hint)])
    try:
        # tyro's own boxed message goes nowhere: one line of ours follows.
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(shadow, args=["--value", *values], console_outputs=False).value
    except SystemExit:
        raise _refused(item, prog) from None


def _refused(item: Given, prog: str) -> UserError:
    value = "" if item.values else " needs a value"
    return UserError(f"{item.spoken}{value}; allowed: {allowed(item.setting.hint)}; see `{prog} --help`")


def _rebuilt(base: Any, changes: dict[str, Any]) -> Any:
    try:
        return dataclasses.replace(base, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None


def _options(hint: Any) -> list[Any]:
    """Return the members of a union, or the hint alone; Annotated is taken off."""
    if typing.get_origin(hint) is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for member in typing.get_args(hint) for option in _options(member)]
    return [hint]


def _allows_none(hint: Any) -> bool:
    return type(None) in _options(hint)


def _numbers_in_a_row(hint: Any) -> bool:
    rows = [option for option in _options(hint) if typing.get_origin(option) in (tuple, list)]
    return any(set(typing.get_args(row)) <= {int, float, ...} for row in rows)


def allowed(hint: Any) -> str:
    """Return in words what a flag takes: "an integer, or several"."""
    words = {int: "an integer", float: "a number", str: "text", Path: "a path", bool: "true or false"}
    told = []
    for option in _options(hint):
        args = typing.get_args(option)
        if option is type(None):
            told.append("none")
        elif typing.get_origin(option) is typing.Literal:
            told.append(" or ".join(map(str, args)))
        elif typing.get_origin(option) in (tuple, list):
            told.append(f"one or more values, each {allowed(args[0])}" if args else "any number of values")
        else:
            told.append(words.get(option, getattr(option, "__name__", str(option))))
    return ", or ".join(told)
