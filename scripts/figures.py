"""Fill the figures of README.md, docs/ and reproductions/ from recorded JSON files; --check only compares.

A block begins with <!-- figures: NAME --> and ends with <!-- /figures -->; what stands between comes from
reproductions/NAME.json. Nobody types a measured number.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from gatewright.experiments import deep_pages  # noqa: E402
from gatewright.experiments.pages import taken_from  # noqa: E402
from scripts import bench_figures, classic_figures  # noqa: E402

BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w./-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def pages(root: Path) -> list[Path]:
    """Return the pages that may hold blocks."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in [*found, *sorted((root / "reproductions").glob("*.md"))] if path.is_file()]


def filled(text: str, root: Path) -> str:
    """Return a page with every block rewritten from its JSON file."""
    return BLOCK.sub(lambda match: f"{match[1]}{block(match['name'], root)}{match[3]}", text)


def block(name: str, root: Path) -> str:
    """Return the text of one block; one sentence when the result is not recorded yet."""
    path = root / "reproductions" / f"{name}.json"
    if not path.is_file():
        own = name.replace("-", " ", 1) if name.startswith("bench-") else None
        command = own or f"reproduce {name.replace('-', '/', 1)}"
        return f"Not recorded yet; `gatewright {command}` gives it.\n"
    record = json.loads(path.read_text(encoding="utf-8"))
    words = str(record.get("schema", "")).split(".")
    if words[:2] == ["gatewright", "bench"]:
        return bench_figures.BLOCKS[words[2]](record, path.name)
    if words[:1] == ["gatewright"] and words[1] in classic_figures.BLOCKS:
        return classic_figures.BLOCKS[words[1]](record, path.name)
    if words[:2] == ["gatewright", "deep_moe"]:
        return deep_pages.block(record, path.name)
    if "arms" in record:
        return arms_block(record, path.name)
    # A reproduction keeps the race beside the sweep that chose its learning rates.
    record = record.get("race", record)
    schema = str(record.get("schema", ""))
    if not schema.startswith("gatewright.race."):
        raise ValueError(f"{path.name}: no way to show a record of schema {schema!r}")
    return race_block(record, path.name)


def race_block(record: Mapping[str, Any], source: str) -> str:
    """Return a race as a sentence, a table with one row per seed and side, and where it was measured."""
    lines = [record["verdict"]["sentence"], ""]
    lines += ["| seed | model | parameters (active / total) | tokens | bits per byte | training time |"]
    lines += ["|--:|---|--:|--:|--:|--:|"]
    for run in record["runs"]:
        lines += [_side_row(run["seed"], side) for side in run["sides"]]
    lines += ["", *(_comparison(item) for item in record["comparisons"])]
    place = record["environment"]
    lines += [
        "",
        f"Measured with `{record['command']}` on {place['processor']}, {place['threads']} threads, torch "
        f"{place['torch']}, commit `{place['commit']}`; every number is taken from `reproductions/{source}`.",
    ]
    return "\n".join(lines) + "\n"


def arms_block(record: Mapping[str, Any], source: str) -> str:
    """Return an experiment with many arms as a sentence, a row per arm, and where it was measured."""
    lines = [record["verdict"]["sentence"], ""]
    lines += [
        "| arm | bits per byte by seed | MaxVio in training | dropped | step time |",
        "|---|---|--:|--:|--:|",
    ]
    for name, arm in record["arms"].items():
        seeds = arm["seeds"]
        bits = ", ".join("diverged" if s["valid_bpb"] is None else f"{s['valid_bpb']:.4f}" for s in seeds)
        own = [s["training"] for s in seeds if "training" in s]
        worst = f"{sum(s['max_violation'] for s in own) / len(own):.2f}" if own else "-"
        lost = f"{100 * sum(s['dropped'] for s in own) / len(own):.1f} %" if own else "-"
        ahead = "" if arm["causal"] else " (looks ahead)"
        time = f"{arm['step_time']['median']:.2f}"
        lines.append(f"| {name}{ahead} | {bits} | {worst} | {lost} | {time} |")
    lines += [
        "",
        *record["verdict"].get("table", []),
        taken_from(record, source),
    ]
    return "\n".join(lines) + "\n"


def _side_row(seed: int, side: Mapping[str, Any]) -> str:
    final = side["final"]
    size = f"{_short(side['active_parameters'])} / {_short(side['total_parameters'])}"
    return (
        f"| {seed} | {side['label']} | {size} | {_short(final['tokens'])} | {final['valid_bpb']:.4f} "
        f"| {final['seconds'] / 60:.1f} min |"
    )


def _comparison(item: Mapping[str, Any]) -> str:
    time = item["step_time_ratio"]
    tokens, flops, seconds = (f"{100 * item[f'{of}_share']:.0f} %" for of in ("token", "flop", "second"))
    gap = f"{abs(item['gap_bpb']):.4f} bits per byte {'better' if item['gap_bpb'] > 0 else 'worse'}"
    step = (
        f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})" if time else "an unknown number of"
    )
    return (
        f"- seed {item['seed']}, {item['sparse']} against {item['dense']}: {gap} on {tokens} of the tokens, "
        f"{flops} of the training FLOPs, {seconds} of the seconds; a step takes {step} times as long."
    )


def _short(count: float) -> str:
    """Return 6290000 as "6.29M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def main(argv: list[str], root: Path = ROOT) -> int:
    """Rewrite the pages, or with --check name those that differ and return 1."""
    stale = []
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        new = filled(text, root)
        if new != text:
            stale.append(str(path.relative_to(root)))
            if "--check" not in argv:
                path.write_text(new, encoding="utf-8")
    if "--check" in argv and stale:
        print(
            f"figures differ from reproductions/*.json in {', '.join(stale)}; run `make docs`",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
