"""`gatewright generate OUT`: continue a text with a run's newest checkpoint, shown as it is drawn."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO

from .run import Common, Outcome, command, prepare_process


@dataclass(frozen=True)
class GenerateSettings:
    """How the text is continued."""

    prompt: str = ""  # the text to continue; none begins a new document
    max_new_tokens: int = 400  # tokens to draw at most; an end of text ends it earlier
    temperature: float = 0.8  # 0 takes the likeliest token; 1 is the model's own distribution
    top_p: float = 0.95  # draw from the likeliest tokens that together have this probability
    top_k: int | None = None  # draw from this many of the likeliest tokens
    seed: int = 0  # of the draws
    ahead: bool = False  # let the model's further block (deepseek_v3) guess tokens: the same text, sooner
    averaged: bool = False  # use the averaged weights instead of the live ones
    int8_experts: bool = False  # read the experts' weights in int8
    threads: int = 0  # CPU threads; 0 is torch's own choice
    device: str = "cpu"  # cpu, cuda, or cuda:N


def main(argv: list[str]) -> int:
    """Run the command; the text goes to stdout piece by piece, unless --json asks for it whole."""
    stdout = sys.stdout
    return command(argv, lambda rest, common: work(rest, common, stdout))


def work(argv: list[str], common: Common, stdout: TextIO) -> Outcome:
    """Generate, show piece by piece, and return the text."""
    from .parse import settings_from, the_word

    out, rest = the_word(argv, "gatewright generate", "OUT", "the --out folder of a run")
    (s,) = settings_from(rest, GenerateSettings, prog="gatewright generate", words="OUT", toml=common.from_)
    prepare_process(s.threads)
    from ..generation import TextStream, stream
    from ..training.load import load_run

    loaded = load_run(out, device=s.device, averaged=s.averaged, int8_experts=s.int8_experts)
    model: Any = loaded.model
    start, reader, pieces = time.monotonic(), TextStream(loaded.tokenizer), [s.prompt]
    show = str if common.json else stdout.write
    drawing = {key: getattr(s, key) for key in ("temperature", "top_p", "top_k", "seed", "ahead")}
    ids = [loaded.tokenizer.eot, *loaded.tokenizer.encode(s.prompt).tolist()]
    drawn = stream(model, ids, max_new_tokens=s.max_new_tokens, stop=ids[:1], **drawing)
    show(s.prompt)  # after stream has checked its arguments: a mistake prints its line and nothing else
    for token in drawn:
        pieces.append(reader.push(token))
        show(pieces[-1])
        stdout.flush()
    seconds, last = time.monotonic() - start, reader.flush()
    data = {"out": out, "step": loaded.step, "new_tokens": len(pieces) - 1, "seconds": seconds}
    return Outcome({**data, "prompt": s.prompt, "text": "".join([*pieces[1:], last])}, f"{last}\n")
