"""Read one file as text: encodings, compression, JSON lines, parquet; whatever is wrong is a `NotText`."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from gatewright.errors import UserError

BLOCK = 1 << 20
JSON_LINES = {".jsonl", ".ndjson"}
COMPRESSED: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": lambda path: cast(IO[bytes], gzip.GzipFile(path)),
    ".xz": lambda path: cast(IO[bytes], lzma.LZMAFile(path)),  # noqa: SIM115 - the caller closes it
}
PARQUET = ".parquet"
BINARY = "holds NUL bytes, so it is binary data"
FIELDS = ("text", "content")
_FIELD_NAMES = " or ".join(f'"{name}"' for name in FIELDS)
# UTF-32's mark begins with UTF-16's, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class NotText(Exception):
    """A file that cannot be read as text; the message says why and completes "FILE ..."."""


def plain_suffix(path: Path) -> str:
    """Return the suffix in lower case, looking through .gz and .xz: ".jsonl" for a.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def read_records(path: Path, note: Callable[[str], None]) -> Iterator[Iterator[str]]:
    """Yield the texts in a file, each as its blocks: one for plain text, one per record otherwise.

    `note` is told of records that are left out. Raises NotText (midway, perhaps) when the file is not text.
    """
    suffix = plain_suffix(path)
    if suffix == PARQUET:
        yield from (iter([text]) for text in _parquet(path))
    elif suffix in JSON_LINES:
        yield from (iter([text]) for text in _json_lines(path, note))
    else:
        yield read_blocks(path)


def read_blocks(path: Path) -> Iterator[str]:
    """Yield a file's text in blocks: decompressed, byte-order mark taken off, every line end as a newline."""
    opener = COMPRESSED.get(path.suffix.lower())
    try:
        with opener(path) if opener else open(path, "rb") as file:
            yield from _decode(file)
    except UnicodeDecodeError as error:
        raise NotText(f"is not UTF-8 text ({error.reason})") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise NotText(f"is a broken {path.suffix[1:]} file ({error})") from None
    except OSError as error:
        raise NotText(f"cannot be read ({error.strerror or error})") from None


def _decode(file: IO[bytes]) -> Iterator[str]:
    first = file.read(BLOCK)
    encoding, raw = "utf-8", first
    for mark, name in _MARKS:
        if first.startswith(mark):
            encoding, raw = name, first[len(mark) :]
            break
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    while True:
        if encoding == "utf-8" and b"\0" in raw:
            raise NotText(BINARY)
        text = lines.decode(raw, final=not first)
        if "\0" in text:
            raise NotText(BINARY)
        if text:
            yield text
        if not first:
            return
        raw = first = file.read(BLOCK)


def _lines(path: Path) -> Iterator[str]:
    held: list[str] = []
    for block in read_blocks(path):
        *whole, last = block.split("\n")
        for line in whole:
            held.append(line)
            yield "".join(held)
            held = []
        held.append(last)
    yield "".join(held)


def _json_lines(path: Path, note: Callable[[str], None]) -> Iterator[str]:
    bad: list[int] = []
    good = 0
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        text = _record_text(line)
        if text is None:
            bad.append(number)
        else:
            good += 1
            yield text
    wanted = f"a JSON object with a string {_FIELD_NAMES}"
    if bad and not good:
        raise NotText(f"has no line that is {wanted}")
    if bad:
        shown = ", ".join(str(number) for number in bad[:8]) + (", ..." if len(bad) > 8 else "")
        lines = "line" if len(bad) == 1 else "lines"
        note(f"{path.name}: {len(bad)} {lines} skipped ({lines} {shown}), not {wanted}")


def _record_text(line: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    found = (record[name] for name in FIELDS if isinstance(record.get(name), str))
    return cast("str | None", next(found, None))


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path.name} is a parquet file, which takes the package pyarrow; "
            "run: pip install 'gatewright[parquet]'; or give text or JSON lines"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            name = next((name for name in FIELDS if name in file.schema_arrow.names), None)
            if name is None:
                raise NotText(f"has no column {_FIELD_NAMES}")
            for batch in file.iter_batches(columns=[name], batch_size=256):
                yield from _strings(batch.column(0).to_pylist(), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise NotText(f"is a broken parquet file ({str(error).splitlines()[0]})") from None


def _strings(values: list[Any], name: str) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise NotText(f"has a column {name!r} that is not text")
