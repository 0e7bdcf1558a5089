"""The training tests' text, cache and server of forked runs, for races."""

from tests.training.conftest import cache, corpus, data, server, shared

__all__ = ["cache", "corpus", "data", "server", "shared"]
