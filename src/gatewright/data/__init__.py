"""Corpora: real text in named domains, tokenizers, a split by document, and a resumable stream of batches."""

from gatewright.data.corpus import Corpus, ValidSet, open_corpus
from gatewright.data.profile import DataProfile, DomainProfile, profile_corpus, profile_data
from gatewright.data.stream import TokenStream
from gatewright.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "DataProfile",
    "DomainProfile",
    "JsonTokenizer",
    "TokenStream",
    "Tokenizer",
    "ValidSet",
    "load_tokenizer",
    "open_corpus",
    "profile_corpus",
    "profile_data",
    "train_bpe",
]
