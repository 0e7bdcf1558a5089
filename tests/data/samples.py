"""Small texts for the data tests: reproducible prose without a file of anybody's text."""

from __future__ import annotations

import random
from pathlib import Path

SYLLABLES = [consonant + vowel for consonant in "bdklmn" for vowel in "aeiou"]


def words(count: int, seed: int) -> list[str]:
    """Return random words of one to four syllables."""
    draw = random.Random(seed)
    return ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(count)]


def prose(num_bytes: int, seed: int = 0) -> str:
    """Return paragraphs of random words, at least `num_bytes` long; two seeds share no long run."""
    draw = random.Random(seed)
    pool = words(400, seed)
    parts: list[str] = []
    size = 0
    while size < num_bytes:
        sentence = " ".join(draw.choices(pool, k=draw.randint(5, 14))).capitalize() + "."
        parts.append(sentence + ("\n\n" if draw.random() < 0.2 else " "))
        size += len(parts[-1])
    return "".join(parts)


def edited(text: str, every: int, seed: int = 1) -> str:
    """Return the text with every `every`-th word replaced; the seed says which ones and by what."""
    split = text.split(" ")
    fresh = words(len(split), seed + 1000)
    return " ".join(fresh[i] if i % every == 7 * seed % every else word for i, word in enumerate(split))


def folder_of(root: Path, texts: dict[str, str]) -> Path:
    """Write files below `root` and return it."""
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root
