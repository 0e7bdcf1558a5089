"""`gatewright bench [layer|decode|routers|step]`: what layers, decoding, routers and training steps cost."""

from __future__ import annotations

import dataclasses
from typing import Any

from .run import Common, Outcome, command, fail, prepare_process

# Word -> settings class and function, both of gatewright.measuring; the first is what no word means.
KINDS = {
    "layer": ("BenchRun", "bench_layer"),
    "decode": ("DecodeRun", "bench_decode"),
    "routers": ("RoutersRun", "bench_routers"),
    "step": ("StepRun", "bench_step"),
}
INTRO = (
    "layer, the default: one expert layer against dense layers and transformers.\n"
    "decode: tokens one by one, and a prompt, by our decoder and by transformers.\n"
    "routers: every routing rule against plain token choice.\n"
    "step [PAPER]: a whole training step, sparse and dense, part by part."
)


def main(argv: list[str]) -> int:
    """Run the command; exit code 1 when the machine was too busy for some rows."""
    return command(argv, work)


def work(argv: list[str], common: Common) -> Outcome:
    """Measure and return the result; rows that were refused are named on stderr."""
    from .. import measuring
    from ..errors import RunFailure, UserError, did_you_mean
    from .paper import run_from
    from .parse import settings_from, take_words

    words, rest = take_words(argv, most=1)
    kind = words[0] if words else next(iter(KINDS))
    if kind not in KINDS:
        near = did_you_mean(kind, KINDS)
        raise UserError(f"gatewright bench {kind}: unknown{near}; allowed: {', '.join(KINDS)}")
    settings, function = (getattr(measuring, name) for name in KINDS[kind])
    prog = f"gatewright bench {kind}"
    run: Any
    if kind == "step":
        run = run_from(rest, settings, common.from_, prog)
    else:
        (run,) = settings_from(rest, settings, prog=prog, toml=common.from_, intro=INTRO)
    kept = prepare_process(run.threads, keep_memory=run.allocator == "kept")
    # What took effect is what is recorded.
    run = dataclasses.replace(run, allocator="kept" if kept else "default")
    result: Any = function(run)
    try:
        result.check()
    except RunFailure as refused:
        return Outcome(result.to_dict(), result.to_text(), fail(str(refused), refused.exit_code))
    return Outcome(result.to_dict(), result.to_text())
