"""Files and folders of every shape are read, skipped and counted, or refused in one line."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gatewright.data.files import file_sources
from gatewright.data.formats import NotText, read_blocks, read_records
from gatewright.data.store import TextStore, TextWriter
from gatewright.errors import UserError
from tests.data.samples import folder_of, prose


def read_all(folder: Path, *paths: Path) -> tuple[TextStore, list[str]]:
    """Return the store of what the paths give, and the notes for the user."""
    folder.mkdir(exist_ok=True)
    with TextWriter(folder, lambda line: None) as writer:
        for source in file_sources(paths):
            writer.read(source)
        store, _ = writer.finish()
    return store, writer.notes


def texts_of(tmp_path: Path, *paths: Path) -> list[str]:
    store, _ = read_all(tmp_path / "store", *paths)
    return [store.bytes_of(number).decode() for number in range(len(store.table))]


def refusal(tmp_path: Path, *paths: Path) -> str:
    """Return the one line that refuses the paths."""
    with pytest.raises(UserError) as caught:
        read_all(tmp_path / "store", *paths)
    line = str(caught.value)
    assert "\n" not in line
    assert line.count(";") >= 1
    return line


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"plain \xc3\xa9\n", "plain é\n"),
        (b"\xef\xbb\xbfwith a mark\n", "with a mark\n"),
        (b"one\r\ntwo\rthree\n", "one\ntwo\nthree\n"),
        ("é and 日\r\n".encode("utf-16"), "é and 日\n"),
        (b"\xfe\xff" + "big end".encode("utf-16-be"), "big end"),
        ("wide".encode("utf-32"), "wide"),
    ],
)
def test_encodings(tmp_path: Path, raw: bytes, text: str):
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    assert "".join(read_blocks(path)) == text


def test_a_character_across_two_blocks_is_whole(tmp_path: Path):
    text = "x" * ((1 << 20) - 1) + "é" + "\r\n" * 5
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(read_blocks(tmp_path / "a.txt")) == text.replace("\r\n", "\n")


def test_compressed_files(tmp_path: Path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"zipped text"))
    (tmp_path / "b.md.xz").write_bytes(lzma.compress(b"squeezed text"))
    assert texts_of(tmp_path, tmp_path / "a.txt.gz", tmp_path / "b.md.xz") == ["zipped text", "squeezed text"]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", ["short", "garbled", "other"])
def test_broken_archives(tmp_path: Path, suffix: str, pack, damage: str):
    raw = pack(prose(20_000).encode())
    middle = len(raw) // 2
    bad = {
        "short": raw[:middle],
        "garbled": raw[:middle] + bytes(40) + raw[middle + 40 :],
        "other": b"this was never packed",
    }[damage]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(bad)
    with pytest.raises(NotText, match=f"is a broken {suffix[1:]} file"):
        list(read_blocks(path))
    assert "is a broken" in refusal(tmp_path, path)
    folder = folder_of(tmp_path / "folder", {"good.txt": "kept"})
    (folder / "a.txt").with_suffix(f".txt{suffix}").write_bytes(bad)
    store, notes = read_all(tmp_path / "store", folder)
    assert list(store.texts(range_of(store))) == ["kept"]
    assert "1 skipped, each is a broken" in notes[0]


def range_of(store: TextStore):
    return store.table[:, 0].argsort()


def test_json_lines(tmp_path: Path):
    lines = [
        {"text": "first"},
        {"content": "second", "id": 2},
        {"text": None, "content": "third"},
    ]
    bad = ["{broken", '["a list"]', '{"text": 5}', '{"other": "x"}', "[" * 100_000]
    body = "\n".join([*(json.dumps(line) for line in lines), "", *bad]) + "\n"
    path = folder_of(tmp_path, {"a.jsonl": body}) / "a.jsonl"
    store, notes = read_all(tmp_path / "store", path)
    assert list(store.texts(range_of(store))) == ["first", "second", "third"]
    wanted = (
        'a.jsonl: 5 lines skipped (lines 5, 6, 7, 8, 9), not a JSON object with a string "text" or "content"'
    )
    assert notes == [wanted]


def test_json_lines_without_one_good_line(tmp_path: Path):
    path = folder_of(tmp_path, {"a.ndjson": '{"body": "x"}\n'}) / "a.ndjson"
    assert 'has no line that is a JSON object with a string "text"' in refusal(tmp_path, path)


def test_parquet(tmp_path: Path):
    for name, column in {"a": "text", "b": "content"}.items():
        table = pyarrow.table({column: [f"{name} one", None, f"{name} two"], "n": [1, 2, 3]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    texts = texts_of(tmp_path, tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert texts == ["a one", "a two", "b one", "b two"]


def test_parquet_that_cannot_be_used(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    assert 'has no column "text" or "content"' in refusal(tmp_path, path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [5]}), path)
    assert "column 'text' that is not text" in refusal(tmp_path, path)
    path.write_bytes(b"PAR1 not really")
    assert "is a broken parquet file" in refusal(tmp_path, path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'gatewright[parquet]'" in refusal(tmp_path, path)


def test_a_folder_reads_text_and_counts_the_rest(tmp_path: Path):
    folder = folder_of(
        tmp_path / "notes",
        {
            "a.md": "markdown",
            "deep/er/b.py": "code = 1",
            "README": "no suffix",
            "LICENSE": "nor here",
            "photo.jpg": "not read",
            "data.csv": "1,2",
            ".git/config.txt": "hidden",
            "__pycache__/x.py": "left out",
            ".hidden.txt": "hidden too",
            "empty.txt": "",
            "blank.txt": " \n\n\t\n",
        },
    )
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    store, notes = read_all(tmp_path / "store", folder)
    assert sorted(store.texts(range_of(store))) == ["code = 1", "markdown", "no suffix", "nor here"]
    assert store.domains == ("notes",)
    assert any("1 skipped, each holds NUL bytes, so it is binary data: nul.txt" in note for note in notes)
    assert any("1 skipped, each is not UTF-8 text" in note and "latin.txt" in note for note in notes)
    assert any("2 files not read for their suffix" in note and "1 .jpg" in note for note in notes)


def test_a_file_that_turns_binary_late_leaves_nothing_behind(tmp_path: Path):
    folder = folder_of(tmp_path / "notes", {"a.txt": "kept", "z.txt": prose(3_000_000) + "\0"})
    assert texts_of(tmp_path, folder) == ["kept"]


def test_direct_files_are_read_whatever_their_name(tmp_path: Path):
    path = folder_of(tmp_path, {"story.dat": "some text"}) / "story.dat"
    assert texts_of(tmp_path, path) == ["some text"]


def test_wrong_paths_are_named(tmp_path: Path):
    files = folder_of(
        tmp_path, {"empty.txt": "", "blank.txt": "\n \n", "sub/photo.png": "x", "none/.keep": ""}
    )
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "does not exist" in refusal(tmp_path, tmp_path / "missing.txt")
    assert "is a link to nothing" in refusal(tmp_path, tmp_path / "dangling.txt")
    assert "is an empty file" in refusal(tmp_path, files / "empty.txt")
    assert "holds no text" in refusal(tmp_path, files / "blank.txt")
    assert "holds NUL bytes" in refusal(tmp_path, tmp_path / "binary.bin")
    assert "neither a file nor a folder" in refusal(tmp_path, tmp_path / "pipe.txt")
    assert "it holds 1 other files: 1 .png" in refusal(tmp_path, files / "sub")
    assert "is a folder without a text file;" in refusal(tmp_path, files / "none")
    assert "File name too long" in refusal(tmp_path, tmp_path / ("x" * 300))
    assert "again; each path is given once" in refusal(tmp_path, files / "sub/..", tmp_path)


def test_a_file_without_permission(tmp_path: Path, monkeypatch):
    path = folder_of(tmp_path, {"a.txt": "secret"}) / "a.txt"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Not chmod: the tests may run as root, who may read every file.
    monkeypatch.setattr("gatewright.data.formats.open", refuse, raising=False)
    assert "cannot be read (Permission denied)" in refusal(tmp_path, path)


def test_loops_pipes_and_dead_links_in_a_folder(tmp_path: Path):
    folder = folder_of(tmp_path / "loop", {"a.txt": "one", "sub/b.txt": "two"})
    (folder / "sub/up").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    outside = folder_of(tmp_path / "outside", {"c.txt": "three"})
    (folder / "linked").symlink_to(outside)
    os.mkfifo(folder / "pipe.txt")
    assert sorted(texts_of(tmp_path, folder)) == ["one", "three", "two"]
    assert len(file_sources([folder])[0].identity) == 3, "a loop was walked again and again"


def test_domains_are_named_after_the_paths(tmp_path: Path):
    files = folder_of(tmp_path, {"a/book.txt": "1", "b/book.md": "2", "my notes!/x.txt": "3"})
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"4"))
    paths = [files / "a/book.txt", files / "b/book.md", files / "my notes!", tmp_path / "c.txt.gz"]
    assert [source.name for source in file_sources(paths)] == ["book", "book-2", "my_notes", "c"]


def test_what_is_read_decides_the_identity(tmp_path: Path):
    folder = folder_of(tmp_path / "notes", {"a.txt": "one", "b.txt": "two"})
    before = file_sources([folder])[0].identity
    assert file_sources([folder])[0].identity == before
    (folder / "a.txt").write_text("changed")
    after = file_sources([folder])[0].identity
    assert after != before
    os.utime(folder / "b.txt", ns=(1, 1))
    assert file_sources([folder])[0].identity != after


def test_one_long_line_and_a_million_empty_ones(tmp_path: Path):
    began = time.process_time()
    (tmp_path / "long.txt").write_text("word " * (24 * 1024 * 1024 // 5))
    (tmp_path / "lines.txt").write_text("a" + "\n" * 1_000_000 + "b")
    (tmp_path / "record.jsonl").write_text(json.dumps({"text": "x" * 4_000_000}) + "\n")
    store, _ = read_all(
        tmp_path / "store", *(tmp_path / n for n in ("long.txt", "lines.txt", "record.jsonl"))
    )
    assert store.sizes.max() <= 65_536
    assert time.process_time() - began < 20


def test_records_are_read_lazily(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 3)
    records = read_records(tmp_path / "a.jsonl", print)
    assert "".join(next(records)) == "one"
