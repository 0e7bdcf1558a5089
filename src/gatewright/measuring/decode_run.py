"""The settings, the rows and the result of a decoding race."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gatewright.errors import RunFailure, UserError
from gatewright.measuring.decoders import INT8, OURS, THEIRS
from gatewright.measuring.grid import Dtype
from gatewright.measuring.record import LARGEST_SPREAD, Row
from gatewright.measuring.rounds import Middle, best_of_rounds, check_rounds, middle, paired, spread
from gatewright.measuring.run import Allocator

Kind = Literal["decode-1", "decode-8", "prefill"]
KINDS: tuple[Kind, ...] = ("decode-1", "decode-8", "prefill")
FASTER, SHARE = 1.5, 0.6  # than transformers' best; of the bandwidth


class Case(NamedTuple):
    """One row: a dtype, and what is done."""

    dtype: Dtype
    kind: Kind


@dataclass(frozen=True)
class DecodeRun:
    """Time decoding and prefill of one Mixtral-shaped decoder, sides alternating."""

    width: int = 512
    """D, width of the residual stream"""
    layers: int = 8
    """L, decoder layers"""
    heads: int = 8
    """H, query heads, which divide the width"""
    kv_heads: int = 4
    """Hkv, key and value heads, which divide the heads"""
    experts: int = 8
    """E, experts per layer"""
    selected: int = 2
    """K, experts per token"""
    expert_width: int = 1792
    """F, hidden width of an expert"""
    vocab_size: int = 8192
    """V, ids"""
    prompt: int = 128
    """tokens before the decoded ones"""
    tokens: int = 32
    """tokens that are decoded in a turn"""
    prefill: int = 512
    """tokens that are read at once in the prefill's turn"""
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")
    """of weights and activations"""
    kinds: tuple[Kind, ...] = KINDS
    """decoding one text or eight, and reading a prompt"""
    rounds: int = 12
    """rounds per row, 11 or more; in each of them every side runs once"""
    threads: int = 0
    """CPU threads; 0 is torch's own choice"""
    allocator: Allocator = "kept"
    """big blocks of freed memory stay in the process (kept) or go back to the system (default)"""
    resume: bool = False
    """keep rows that the folder already holds from the same settings, machine and code"""
    out: str = "runs/bench"
    """folder of the result: decode.json"""

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        sizes = self.sizes()
        if min(sizes.values()) < 1:
            raise UserError(f"sizes {sizes}; allowed: 1 or more of each")
        if self.width % self.heads or self.width // self.heads % 2 or self.heads % self.kv_heads:
            raise UserError(
                f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}; allowed: heads that "
                "divide the width into even parts, key and value heads that divide the heads"
            )
        for name in ("dtypes", "kinds"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; allowed: one value or more")

    def sizes(self) -> dict[str, int]:
        """Return every size of the model and of the texts."""
        names = ("width", "layers", "heads", "kv_heads", "experts", "selected", "expert_width", "vocab_size")
        return {name: getattr(self, name) for name in (*names, "prompt", "tokens", "prefill")}

    @property
    def name(self) -> str:
        """The sizes in a word."""
        return "x".join(map(str, self.sizes().values()))

    def cases(self) -> list[Case]:
        """Return every row."""
        return [
            Case(dtype, kind) for dtype in dict.fromkeys(self.dtypes) for kind in dict.fromkeys(self.kinds)
        ]


def decode_record(
    case: Case,
    run: DecodeRun,
    seconds: Mapping[str, Sequence[float]],
    weights: Mapping[str, float] | None,
    read_bytes: int,
    left_out: Mapping[str, str],
) -> Row:
    """Return a row as plain data; every ratio is the median of the rounds' own ratios. `weights` are the
    bytes that a step of our sides needs.
    """
    tokens = run.tokens if weights else run.prefill
    texts = int(case.kind.split("-")[1]) if weights else 1
    theirs = [name for name in THEIRS if name in seconds]
    best = best_of_rounds(seconds, theirs) if theirs else None
    read = seconds["read"]
    ratios: dict[str, Middle | None] = {
        "transformers": paired(seconds[OURS], best) if best else None,
        "int8_over_transformers": paired(seconds[INT8], best) if best else None,
        "int8": paired(seconds[INT8], seconds[OURS]),
    }
    shares = {
        name: middle([needed * tokens / own / (read_bytes / of) for own, of in _rounds(seconds[name], read)])
        for name, needed in (weights or {}).items()
    }
    return {
        "dtype": case.dtype,
        "pass": case.kind,
        "refused": refusal(spread(read)),
        "texts": texts,
        "tokens": tokens,
        "weight_bytes_per_step": weights and dict(weights),
        "bandwidth": middle([read_bytes / taken for taken in read])._asdict(),
        "bandwidth_share": {name: share._asdict() for name, share in shares.items()},
        "tokens_per_second": {
            name: middle([texts * tokens / taken for taken in values])._asdict()
            for name, values in seconds.items()
            if name != "read"
        },
        "ratios": {name: ratio and ratio._asdict() for name, ratio in ratios.items()},
        "spread": {name: spread(values) for name, values in seconds.items()},
        "left_out": dict(left_out),
        "seconds": {name: list(values) for name, values in seconds.items()},
    }


def _rounds(own: Sequence[float], of: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(own, of, strict=True))


def refusal(read_spread: float) -> str | None:
    """Return why a row is not to be used, or None."""
    if read_spread <= LARGEST_SPREAD:
        return None
    return (
        f"reading memory alone spread by {100 * read_spread:.0f} % (at most {100 * LARGEST_SPREAD:.0f} %); "
        "the machine is busy"
    )


def told(row: Row) -> str:
    """Return a row as a line."""
    if row["refused"]:
        return f"refused: {row['refused']}"
    speeds = ", ".join(f"{name} {speed['median']:.1f}" for name, speed in row["tokens_per_second"].items())
    words = [f"tokens/s {speeds}"]
    if theirs := row["ratios"]["transformers"]:
        words.append(
            f"{theirs['median']:.2f} of transformers' best time ({theirs['low']:.2f} to {theirs['high']:.2f})"
        )
    for name, share in row["bandwidth_share"].items():
        words.append(f"{name} at {100 * share['median']:.0f} % of the bandwidth")
    return "; ".join(words)


@dataclass(frozen=True)
class DecodeResult:
    """What `bench_decode` measured; `record` is what decode.json holds."""

    record: Mapping[str, Any]
    path: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**self.record, "files": [self.path]}

    def check(self) -> None:
        """Raise RunFailure if the machine was too busy for some rows."""
        refused = [f"{row['dtype']} {row['pass']}" for row in self.record["rows"] if row["refused"]]
        if refused:
            raise RunFailure(
                f"{len(refused)} of {len(self.record['rows'])} rows refused, reading memory alone spread too "
                f"much: {', '.join(refused)}; run again with --resume on a quiet machine; the other rows "
                "are kept"
            )

    def to_text(self) -> str:
        """Return the machine, a line per row, what was left out, and the goals."""
        where, settings = self.record["environment"], self.record["settings"]
        sizes = ", ".join(f"{name} {value}" for name, value in settings["sizes"].items())
        lines = [
            f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, transformers "
            f"{settings['transformers'] or 'not installed'}, commit {where['commit']}",
            sizes,
            "",
        ]
        for row in self.record["rows"]:
            lines.append(f"{row['dtype']} {row['pass']}: {told(row)}")
            lines += [f"  left out: {name}: {reason}" for name, reason in row["left_out"].items()]
            lines += [f"  ids: {words}" for words in agreements(row)]
        return "\n".join([*lines, "", *goals(self.record["rows"]), "", self.path])


def agreements(row: Row) -> list[str]:
    """Return a line for each side whose greedy ids are not ours."""
    lines = []
    for name, found in row["agreement"].items():
        if found["rows_equal"] < found["rows"]:
            texts, lead = f"{found['rows_equal']} of {found['rows']}", found["widest_lead_where_parted"]
            lines.append(
                f"{name}: {texts} texts equal, {100 * found['share']:.0f} % of the ids; where they part our "
                f"logit leads by up to {lead:.1e} of the largest"
            )
    return lines


def goals(rows: Sequence[Row]) -> list[str]:
    """Return a line for each goal of each row that was not refused."""
    lines = []
    for row in rows:
        theirs, where = row["ratios"]["transformers"], f"{row['dtype']} {row['pass']}"
        if row["refused"]:
            continue
        if theirs:
            limit = 1.0 if row["pass"] == "prefill" else FASTER
            faster = 1 / theirs["median"]
            word = "held" if faster >= limit else "not held"
            lines.append(f"{word}: {where}: {limit} times as fast as transformers' best: {faster:.2f}")
        if share := row["bandwidth_share"].get(OURS):
            word = "held" if share["median"] >= SHARE else "not held"
            lines.append(f"{word}: {where}: {SHARE} of the bandwidth: {share['median']:.2f}")
    return lines
