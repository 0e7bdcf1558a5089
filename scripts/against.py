"""Time both models of the quickstart's race at another commit and here, in turns.

    python scripts/against.py COMMIT [--rounds N] [--tokens N] [--threads N]

Each round runs `gatewright race` once on either side, in a process of its own, and takes each model's median
step; who goes first changes from round to round. Writes reproductions/bench-against.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("dense", "sparse")
# Steps that are not counted: the first ones draw memory and build kernels.
WARM = 20


def step_seconds(log: str, warm: int = WARM) -> float:
    """Return the median of a run's recorded step times, those of its first steps left out."""
    lines = [json.loads(line) for line in log.splitlines() if line]
    steps = [line for line in lines if line.get("kind") == "step" and line["step"] > warm]
    return statistics.median(line["step_seconds"] for line in steps)


def time_once(tree: Path, cache: Path, tokens: int, threads: int) -> dict[str, float]:
    """Return the median step of either model of a short race in this tree, in seconds."""
    flags = ("--tokens", str(tokens), "--evaluations", "1", "--warmup-steps", "10", "--threads", str(threads))
    own = {**os.environ, "PYTHONPATH": str(tree / "src"), "GATEWRIGHT_CACHE": str(cache)}
    with tempfile.TemporaryDirectory() as out:
        asked = [sys.executable, "-m", "gatewright.cli", "race", "--out", out, *flags]
        done = subprocess.run(asked, env=own, cwd=tree, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"race in {tree} ended with {done.returncode}: {done.stderr[-2000:]}")
        logs = {name: (Path(out) / "seed0" / name / "log.jsonl").read_text("utf-8") for name in MODELS}
    return {name: step_seconds(log) for name, log in logs.items()}


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return {model: {"there_ms", "here_ms", "ratio", "low", "high"}}: medians, and ratios within rounds."""
    found = {}
    for name in MODELS:
        ratios = [turn["there"][name] / turn["here"][name] for turn in rounds]
        found[name] = {
            f"{side}_ms": 1e3 * statistics.median(turn[side][name] for turn in rounds)
            for side in ("there", "here")
        }
        found[name] |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def git(*words: str) -> str:
    """Return what git says."""
    return subprocess.run(
        ("git", *words), cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description="Time the race's models at another commit and here.")
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=819_200)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args(argv)
    from gatewright.training.workplace import environment, now

    with tempfile.TemporaryDirectory() as folder:
        there, caches = Path(folder) / "there", {side: Path(folder) / side for side in ("a", "b")}
        git("worktree", "add", "--detach", str(there), asked.commit)
        try:
            sides = {"there": (there, caches["a"]), "here": (ROOT, caches["b"])}
            rounds = []
            for turn in range(-1, asked.rounds):  # the first builds both texts and is not counted
                order = list(sides)[:: 1 if turn % 2 else -1]
                took = {side: time_once(*sides[side], asked.tokens, asked.threads) for side in order}
                print(turn, {s: {m: round(1e3 * v, 1) for m, v in own.items()} for s, own in took.items()})
                rounds.append(took)
            rounds = rounds[1:]
        finally:
            git("worktree", "remove", "--force", str(there))
    record = {
        "schema": "gatewright.bench.against.v1",
        "command": f"python scripts/against.py {asked.commit} --rounds {asked.rounds}",
        "there": git("rev-parse", "--short=12", asked.commit),
        "settings": {"tokens": asked.tokens, "threads": asked.threads, "rounds": asked.rounds},
        "models": summary(rounds),
        "rounds": rounds,
        "environment": environment("cpu") | {"threads": asked.threads},
        "created": now(),
    }
    path = ROOT / "reproductions" / "bench-against.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["models"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
