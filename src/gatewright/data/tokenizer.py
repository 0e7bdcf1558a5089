"""Tokenizers: bytes, byte-level BPE trained here, and any tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gatewright.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")
SMALLEST_BPE, LARGEST_BPE = 260, 65_536
_CALL = "takes bytes, bpe:N or the path of a tokenizer.json"


class Tokenizer(Protocol):
    """Text to ids and back; `eot` separates documents and stands for no bytes of text."""

    name: str
    vocab_size: int
    eot: int
    byte_lengths: NDArray[np.int32]

    def encode(self, text: str) -> NDArray[np.int64]: ...
    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]: ...
    def decode(self, ids: ArrayLike) -> str: ...
    def pieces(self, ids: ArrayLike) -> list[str]: ...
    def save(self, path: str | Path) -> None: ...
    def to_json(self) -> str: ...


def _flat(ids: ArrayLike) -> NDArray[np.int64]:
    return np.asarray(ids, dtype=np.int64).reshape(-1)


def printable(raw: bytes) -> str:
    """Return the text of one token's bytes, with bytes that are no whole character written as \\xNN."""
    return raw.decode("utf-8", "backslashreplace")


class ByteTokenizer:
    """The 256 bytes of UTF-8 and an end-of-text id, 256. Loses nothing: every byte string has its own ids."""

    name = "bytes"
    vocab_size = 257
    eot = 256

    def __init__(self) -> None:
        self.byte_lengths: NDArray[np.int32] = np.ones(257, dtype=np.int32)
        self.byte_lengths[256] = 0

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return one id per UTF-8 byte: int64 [num_bytes]. A lone surrogate becomes a question mark."""
        return self.encode_bytes(text.encode("utf-8", "replace"))

    def encode_bytes(self, raw: bytes) -> NDArray[np.int64]:
        """Return one id per byte: int64 [len(raw)]; any bytes, UTF-8 or not."""
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Return `encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """Return the exact bytes that the ids stand for; ends of text are left out."""
        flat = _flat(ids)
        return flat[flat < 256].astype(np.uint8).tobytes()

    def decode(self, ids: ArrayLike) -> str:
        """Return the text; a character cut in two becomes U+FFFD (see `decode_bytes` for the exact bytes)."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def pieces(self, ids: ArrayLike) -> list[str]:
        """Return a printable piece for each id."""
        return [printable(bytes([i])) if i < 256 else END_OF_TEXT for i in _flat(ids).tolist()]

    def to_json(self) -> str:
        """Return the JSON text that `load_tokenizer` reads back."""
        return json.dumps({"gatewright_tokenizer": "bytes"})

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a file that `load_tokenizer` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def byte_alphabet() -> dict[str, int]:
    """Return character -> byte of the byte-level alphabet: printable Latin-1 is itself, the rest moved up."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(moved)}


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library, with the bytes that each id stands for.

    For a byte-level vocabulary the bytes are exact. For others they are read off the piece: "▁" is a space,
    "<0x0A>" one byte, a leading "##" nothing; a normaliser that changes the text makes that approximate, so
    bits per byte is taken over the true bytes of the text (`ValidSet.num_bytes`), never over this table.
    """

    def __init__(self, inner: Any, name: str) -> None:
        self._inner = inner
        # Text that happens to spell a special token is text: it must not become an end of document.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self.name = name
        vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{name} holds no vocabulary; --tokenizer {_CALL}; give another file")
        self.vocab_size = max(vocabulary.values()) + 1
        found = [vocabulary[end] for end in _END_NAMES if end in vocabulary]
        self.eot = found[0] if found else self.vocab_size
        self.vocab_size = max(self.vocab_size, self.eot + 1)
        special = {index for index, token in inner.get_added_tokens_decoder().items() if token.special}
        self._raw = self._piece_bytes(vocabulary, special | {self.eot})
        self.byte_lengths: NDArray[np.int32] = np.array([len(raw) for raw in self._raw], dtype=np.int32)
        self._names = {self.eot: END_OF_TEXT} | {
            index: piece for piece, index in vocabulary.items() if index in special | {self.eot}
        }

    def _piece_bytes(self, vocabulary: dict[str, int], special: set[int]) -> list[bytes]:
        settings = json.loads(self._inner.to_str())
        shape = json.dumps([settings.get("pre_tokenizer"), settings.get("decoder")])
        byte_level, word_piece = '"ByteLevel"' in shape, '"WordPiece"' in shape
        alphabet = byte_alphabet()
        raw = [b""] * self.vocab_size
        for piece, index in vocabulary.items():
            if index in special:
                continue
            if byte_level and all(character in alphabet for character in piece):
                raw[index] = bytes(alphabet[character] for character in piece)
            elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
                raw[index] = bytes([int(piece[3:5], 16)])
            else:
                plain = piece.removeprefix("##") if word_piece else piece.replace("▁", " ")
                raw[index] = plain.encode("utf-8", "replace")
        return raw

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of the text: int64 [num_ids], no special id added; a lone surrogate becomes "?"."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Return the ids of each text, worked out side by side."""
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        done = self._inner.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in done]

    def decode(self, ids: ArrayLike) -> str:
        """Return the text; ends of text are left out, a character cut in two becomes U+FFFD."""
        flat = _flat(ids)
        return str(self._inner.decode(flat[flat != self.eot].tolist(), skip_special_tokens=True))

    def pieces(self, ids: ArrayLike) -> list[str]:
        """Return a printable piece for each id."""
        return [
            self._names.get(i, END_OF_TEXT if i == self.eot else printable(self._raw[i]))
            for i in _flat(ids).tolist()
        ]

    def to_json(self) -> str:
        """Return the tokenizer.json text, with the end-of-text id and the name beside it."""
        return json.dumps(
            {"gatewright_tokenizer": "json", "name": self.name, "tokenizer": self._inner.to_str()}
        )

    def inner_json(self) -> str:
        """Return the text of a plain tokenizer.json."""
        return str(self._inner.to_str())

    def save(self, path: str | Path) -> None:
        """Write a plain tokenizer.json."""
        Path(path).write_text(self._inner.to_str(pretty=True), encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Return a byte-level BPE of at most `vocab_size` ids (end of text included) trained on the texts."""
    check_bpe_size(vocab_size)
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return JsonTokenizer(inner, f"bpe:{vocab_size}")


def check_bpe_size(vocab_size: int) -> None:
    """Raise UserError unless `vocab_size` is a size that a byte-level BPE can have here."""
    if not SMALLEST_BPE <= vocab_size <= LARGEST_BPE:
        raise UserError(
            f"--tokenizer bpe:{vocab_size} was given; N is {SMALLEST_BPE} to {LARGEST_BPE} "
            "(256 bytes, an end of text, and merges); bpe:4096 is a good start"
        )


def parse_tokenizer(given: str) -> tuple[str, int | Path | None]:
    """Return ("bytes", None), ("bpe", N) or ("file", path) for what the user gave, or raise UserError."""
    if given == "bytes":
        return "bytes", None
    if given.startswith("bpe:") or given == "bpe":
        size = given.partition(":")[2]
        if not re.fullmatch(r"[0-9]{1,9}", size):
            raise UserError(f"--tokenizer {given!r} was given; it {_CALL}; write for example bpe:4096")
        check_bpe_size(int(size))
        return "bpe", int(size)
    path = Path(given).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"--tokenizer {given!r} is neither a file nor a known name; it {_CALL}; check the path"
        )
    return "file", path


def _unusable(name: str, reason: str) -> UserError:
    return UserError(f"{name} is not a tokenizer.json ({reason}); --tokenizer {_CALL}; check the file")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer saved at `path`: ours, or any tokenizer.json; raise UserError for others."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the tokenizer {path} ({error}); --tokenizer {_CALL}; check the file"
        ) from None
    return tokenizer_from_json(text, str(Path(path).name))


def tokenizer_from_json(text: str, name: str) -> Tokenizer:
    """Return the tokenizer that `to_json` or a tokenizer.json file describes; `name` is for the latter."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{name} is not a tokenizer.json ({error}); --tokenizer {_CALL}; check the file"
        ) from None
    kind = settings.get("gatewright_tokenizer") if isinstance(settings, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "json":
        text, name = settings["tokenizer"], settings["name"]
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_str(text)
    except Exception as error:  # the library raises a bare Exception for a file that it cannot read
        reason = str(error).splitlines()[0] if str(error) else "unknown reason"
        raise UserError(
            f"{name} is not a tokenizer.json ({reason}); --tokenizer {_CALL}; check the file"
        ) from None
    return JsonTokenizer(inner, name)


def beginning_of_text(tokenizer: Path) -> tuple[int, ...]:
    """Return the special ids that a tokenizer.json puts before a text ("<s>"), of which there may be none."""
    from tokenizers import Tokenizer as Inner

    one = Inner.from_file(str(tokenizer)).encode("a", add_special_tokens=True)
    ids = []
    for number, special in zip(one.ids, one.special_tokens_mask, strict=True):
        if not special:
            break
        ids.append(int(number))
    return tuple(ids)
