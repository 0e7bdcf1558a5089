"""Tables of lines: what is read, and where one that is none is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatewright.data.line_tables import read_table
from gatewright.errors import UserError


def test_columns_are_languages_and_an_empty_cell_is_missing(tmp_path: Path):
    path = tmp_path / "lines.tsv"
    path.write_bytes("\ufeffen\tfr\r\none \tun\r\n\r\ntwo\t\r\n \ttrois\r\n".encode())
    assert read_table(path) == {"en": ["one", "two", ""], "fr": ["un", "", "trois"]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("en\none\n", r"line 1: languages 'en'; allowed: two or more"),
        ("en\ten\none\tun\n", r"line 1: languages 'en', 'en'; allowed"),
        ("en\t\none\tun\n", r"line 1: languages 'en', ''; allowed"),
        ("en\tfr\none\tun\ntwo\n", r"line 3: 1 columns; allowed: 2"),
        ("en\tfr\none\tun\tuno\n", r"line 2: 3 columns; allowed: 2"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_its_line(tmp_path: Path, text: str, told: str):
    path = tmp_path / "lines.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        read_table(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"none.tsv is not there; give a UTF-8 file"):
        read_table(tmp_path / "none.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"en\tfr\none\t\xe9\n")
    with pytest.raises(UserError, match=r"cannot be read \(no UTF-8\)"):
        read_table(tmp_path / "latin.tsv")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_table(tmp_path)
