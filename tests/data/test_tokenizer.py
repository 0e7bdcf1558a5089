"""Text to ids and back: nothing is lost, and every id knows how many bytes of text it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gatewright.data import ByteTokenizer, JsonTokenizer, load_tokenizer, train_bpe
from gatewright.data.tokenizer import byte_alphabet, parse_tokenizer, tokenizer_from_json
from gatewright.errors import UserError
from tests.data.samples import prose

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return train_bpe([prose(20_000), "naïve café — 日本語 " * 20], 600)


@given(raw=st.binary(max_size=60))
def test_bytes_of_any_kind_come_back(raw):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_bytes(raw)
    assert tokenizer.decode_bytes(ids) == raw
    assert tokenizer.byte_lengths[ids].sum() == len(raw)
    assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")


@given(text=TEXT, cut=st.integers(0, 300))
def test_bytes_round_trip_and_cuts_inside_a_character(text, cut):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(np.append(ids, tokenizer.eot)) == text.encode()
    assert tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:]) == text.encode()
    assert "".join(tokenizer.pieces(ids[cut:])).isascii()


@settings(deadline=None)
@given(text=TEXT, cut=st.integers(0, 60))
def test_bpe_round_trip_and_byte_lengths(bpe, text, cut):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.byte_lengths[ids].sum() == len(text.encode())
    assert bpe.eot not in ids
    assert ids.max(initial=0) < bpe.vocab_size
    assert isinstance(bpe.decode(ids[cut:]), str)
    assert len(bpe.pieces(ids)) == len(ids)


def test_bpe_is_the_same_each_time_and_shorter_than_bytes(bpe):
    again = train_bpe([prose(20_000), "naïve café — 日本語 " * 20], 600)
    assert again.to_json() == bpe.to_json()
    assert bpe.vocab_size == 600
    assert len(bpe.encode(prose(2_000, seed=0))) < 1_000
    assert bpe.byte_lengths[bpe.eot] == 0


def test_text_that_spells_a_special_token_stays_text(bpe):
    text = "a <|endoftext|> b"
    assert bpe.eot not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text
    again = tokenizer_from_json(bpe.to_json(), "again")
    assert bpe.eot not in again.encode(text)


def test_lone_surrogates_become_question_marks(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_saved_tokenizers_come_back(tmp_path: Path, bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert (again.vocab_size, again.eot) == (tokenizer.vocab_size, tokenizer.eot)
        assert np.array_equal(again.encode("hello there"), tokenizer.encode("hello there"))
        assert np.array_equal(again.byte_lengths, tokenizer.byte_lengths)
    assert tokenizer_from_json(bpe.to_json(), "other name").name == "bpe:600"


def test_the_byte_alphabet_is_the_librarys():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_pieces_are_readable(bpe):
    assert ByteTokenizer().pieces([72, 105, 10, 0xE2, 256]) == ["H", "i", "\n", "\\xe2", "<|endoftext|>"]
    assert bpe.pieces([bpe.eot]) == ["<|endoftext|>"]
    assert "".join(bpe.pieces(bpe.encode("some plain words"))) == "some plain words"


def sentencepiece_like() -> Inner:
    pieces = ["<unk>", "</s>", "<0x0A>", "▁hi", "▁", "h", "i", "é"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    inner = Inner(model)
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "</s>"])
    return inner


def test_a_sentencepiece_like_tokenizer_json(tmp_path: Path):
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.eot, tokenizer.vocab_size) == (1, 8)
    assert tokenizer.byte_lengths.tolist() == [0, 0, 1, 3, 1, 1, 1, 2]
    assert tokenizer.decode(tokenizer.encode("hi hé\n")) == "hi hé\n"


def test_a_word_piece_tokenizer_json_without_an_end_gets_one():
    inner = Inner(models.WordPiece({"un": 0, "##do": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    tokenizer = tokenizer_from_json(inner.to_str(), "words")
    assert (tokenizer.eot, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.byte_lengths.tolist() == [2, 2, 5, 0]
    assert tokenizer.decode([0, 1, 3]) == "undo"


@pytest.mark.parametrize("content", ["not json", "[]", '{"model": {}}', json.dumps({"version": "1.0"}), ""])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        UserError, match=r"tokenizer\.json is not a tokenizer\.json .*check the file"
    ) as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given", ["bpe", "bpe:", "bpe:many", "bpe:-5", "bpe:1e3", "bpe:12", "bpe:99999999", "byte"]
)
def test_a_wrong_name_is_refused_in_one_line(given: str):
    with pytest.raises(UserError, match="tokenizer") as caught:
        parse_tokenizer(given)
    assert given in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_little_text_gives_a_smaller_vocabulary():
    assert 257 <= train_bpe(["ab ab ab"], 5000).vocab_size < 300
