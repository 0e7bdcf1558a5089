"""`python -m benchmarks [GRID] [--out FILE]`: run a named grid, print its table, write raw times as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.layer import GRIDS, run_grid
from benchmarks.routers import run_routers
from gatewright.errors import GatewrightError
from gatewright.training.allocator import keep_big_blocks


def main() -> int:
    """Parse, run, print; exit 2 when the machine is too busy to say anything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("grid", nargs="?", default="small", choices=[*sorted(GRIDS), "routers"])
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds per row, 11 or more")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    keep_big_blocks()
    try:
        if options.grid == "routers":
            record = run_routers(options.rounds, print)
        else:
            record = run_grid(options.grid, options.rounds, print)
    except GatewrightError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return error.exit_code
    out = options.out or Path("runs/bench") / ("routers.json" if options.grid == "routers" else "layer.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"raw times: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
