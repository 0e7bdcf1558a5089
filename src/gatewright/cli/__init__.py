"""The commands. `gatewright --help` reads this table only; a command is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, str] = {
    "race": "train a sparse model against its dense twin on the same tokens; report who won",
    "train": "train one model; checkpoints, run log, report",
    "eval": "bits per byte of a checkpoint, per domain",
    "inspect": "where a model sends tokens: a run, or any transformers checkpoint with experts",
    "convert": "write a checkpoint or a run as transformers, vLLM and llama.cpp read it",
    "generate": "continue a text: with a run, a checkpoint of transformers, or a GGUF file",
    "chat": "talk with a model that has a chat template",
    "distill": "a dense student of a sparse run, and what it keeps of the teacher's gain",
    "finetune": "train a run further on a small real task, and test it there",
    "pairs": "train a model that translates, on lines in several languages",
    "translate": "translate texts with such a model",
    "plan": "parameters, FLOPs and memory of a model, without building it",
    "papers": "the lineage of Mixture-of-Experts and what each paper added",
    "routers": "every routing rule: scores, selection, weights, losses, causal or not",
    "data": "profile the text that a run would train on",
    "bench": "time a layer against dense layers and transformers, or every router, on this machine",
    "doctor": "check this installation and machine",
    "reproduce": "rebuild a recorded result: gatewright reproduce PAPER/TABLE",
}


def overview() -> str:
    """Return the text of `gatewright --help`."""
    width = max(map(len, COMMANDS))
    lines = ["usage: gatewright COMMAND [options]", "", "Mixture-of-Experts models: train, measure, see.", ""]
    lines += [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    lines += [
        "",
        "Every command takes --help, --json (one JSON object on stdout) and --debug (full traceback).",
        "Exit codes: 0 done, 1 failure, 2 a mistake in what was given, 130 interrupted.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (the entry point of the console script)."""
    args = list(sys.argv[1:] if argv is None else argv)
    from .run import emit, fail

    if not args or args[0] in ("-h", "--help", "help"):
        return emit(overview())
    if args[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        return emit(f"gatewright {version('gatewright')}")
    if args[0] not in COMMANDS:
        from ..errors import did_you_mean

        kind = "flag" if args[0].startswith("-") else "command"
        near = did_you_mean(args[0], list(COMMANDS))
        return fail(f"unknown {kind} {args[0]!r}{near}; `gatewright --help` lists the commands", code=2)
    module = importlib.import_module(f".{args[0]}", __name__)
    code: int = module.main(args[1:])
    return code
