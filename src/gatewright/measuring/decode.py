"""`bench_decode`: decoding and prefill of one Mixtral-shaped decoder against transformers, same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.backbones import Decoder
from gatewright.kernels import choose_backend
from gatewright.measuring import decoders
from gatewright.measuring.decode_run import Case, DecodeResult, DecodeRun, decode_record, told
from gatewright.measuring.decoders import COMPILED, GROUPED, INT8, OURS, THEIRS, Continued, Decodes
from gatewright.measuring.grid import DTYPES
from gatewright.measuring.held import CODE, code_version, digest_of, held_rows
from gatewright.measuring.record import Row
from gatewright.measuring.rivals import transformers_version
from gatewright.measuring.roofline import Reader
from gatewright.measuring.rounds import Turn, time_rounds
from gatewright.papers import get_paper
from gatewright.training.checkpoint import write_atomic
from gatewright.training.runlog import Progress
from gatewright.training.workplace import command_line, environment, now, own_folder

SCHEMA = "gatewright.bench.decode.v1"
READ = "read"  # the side that reads a buffer: what a share of the bandwidth is taken of, and how busy it is
READINGS = 20
ROOMS = (*CODE, "backbones", "conversion", "papers")
# Of the largest logit: below this, bf16 rounding decides between the two likeliest ids.
NEAR_TIE = 2**-5


def bench_decode(run: DecodeRun, say: Callable[[str], None] | None = None) -> DecodeResult:
    """Time every case, write `decode.json` into the run's folder after each, and return the result.

    Threads and allocator are the process's own: recorded here, set by `gatewright bench`.
    Args: `say` takes a line of progress per case; None writes to stderr.
    Raises: UserError if the folder is in use.
    """
    say = say or Progress("bench").say
    settings = _settings(run)
    digest = digest_of(settings)
    with own_folder(Path(run.out)) as out:
        path = out / "decode.json"
        held = held_rows(path, digest, "decode") if run.resume else {}
        if settings["transformers"] is None:
            say("transformers is not installed, its sides are left out; pip install 'gatewright[hf]'")
        reader, done, models = Reader(), [], _Models(run)
        cases = run.cases()
        for number, case in enumerate(cases, 1):
            row = held.pop((run.name, *case), None)
            kept = row is not None
            if row is None:
                measured = measure_case(case, run, models.of(case.dtype), reader)
                row = {**measured, "settings": digest, "created": now()}
            done.append(row)
            say(f"{number}/{len(cases)} {' '.join(case)}: {told(row)}{' (kept)' * kept}")
            record = _record(settings, [*done, *held.values()])
            write_atomic(path, json.dumps(record, indent=1) + "\n")
    return DecodeResult(record, str(path))


class _Models:
    """The decoder of each dtype, one at a time: both together need not fit the memory."""

    def __init__(self, run: DecodeRun) -> None:
        self.run = run
        self.held: tuple[str, Decoder] | None = None

    def of(self, dtype: str) -> Decoder:
        if self.held is None or self.held[0] != dtype:
            self.held = None
            self.held = (dtype, build_decoder(self.run, DTYPES[dtype]))
        return self.held[1]


def build_decoder(run: DecodeRun, dtype: torch.dtype) -> Decoder:
    """Return the decoder of these sizes, of random weights that are the same in each call."""
    paper = get_paper("mixtral")
    settings = paper.Settings(
        vocab_size=run.vocab_size,
        width=run.width,
        num_layers=run.layers,
        num_heads=run.heads,
        num_kv_heads=run.kv_heads,
        head_dim=run.width // run.heads,
        num_experts=run.experts,
        num_selected=run.selected,
        expert_width=run.expert_width,
        context=max(run.prompt + run.tokens, run.prefill),
        tie_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Decoder = paper.build(settings)
    return model.to(dtype).eval()


def measure_case(case: Case, run: DecodeRun, decoder: Decoder, reader: Reader) -> Row:
    """Return one row: raw seconds of every side, ratios, what was left out and why."""
    decodes = case.kind.startswith("decode")
    batch, length = (int(case.kind.split("-")[1]), run.prompt) if decodes else (1, run.prefill)
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(run.vocab_size, (batch, length), generator=draw)
    left_out = _left_out(case)
    names = [name for name in (OURS, INT8, *THEIRS) if name not in left_out]
    turns = {READ: Turn(partial(_read_often, reader), lambda: None)}
    found: dict[str, Continued] = {}
    compiled: float | None = None
    for name in names:
        side = decoders.make_side(name, decoder, length + run.tokens)
        with torch.inference_mode():
            first = side.begin(prompts)
        if name == COMPILED:
            compiled, reason = _compiled(side, first)
            if reason:
                left_out[name] = reason
                continue
        found[name] = decoders.continue_greedily(side, first, run.tokens if decodes else 1)
        if decodes:
            turns[name] = decoders.decoding_turn(side, first, run.tokens)
        else:
            turns[name] = decoders.prefill_turn(side, prompts)
    time_rounds(turns, 1)
    seconds = time_rounds(turns, run.rounds)
    weights = _bytes_of_steps(decoder, prompts, found, run.tokens) if decodes else None
    return {
        "name": run.name,
        "compile_seconds": compiled,
        "agreement": {name: agreement(found[OURS], other) for name, other in found.items() if name != OURS},
        **decode_record(case, run, seconds, weights, READINGS * reader.bytes, left_out),
    }


def _read_often(reader: Reader) -> None:
    """Read about as long as the other sides take: a single reading of ten milliseconds says little."""
    for _ in range(READINGS):
        reader.call()


def _bytes_of_steps(
    decoder: Decoder, prompts: Tensor, found: Mapping[str, Continued], tokens: int
) -> dict[str, float]:
    """Return the bytes of weights per step of both of our sides."""
    ids = found[OURS].ids
    assert ids.shape[1] == tokens
    needs = {OURS: decoders.weight_bytes_per_step(decoder, prompts, ids)}
    if INT8 in found:
        int8 = decoders.in_int8(decoder)
        needs[INT8] = decoders.weight_bytes_per_step(int8, prompts, found[INT8].ids)
    return needs


def agreement(ours: Continued, theirs: Continued) -> dict[str, Any]:
    """Return how many of the greedy ids are equal up to each row's first difference, and our logit's lead
    where they part; after a row has parted its texts are two, and nothing more is compared.
    """
    parted = decoders.first_difference(ours, theirs)
    rows, tokens = ours.ids.shape
    equal = rows * tokens - sum(tokens - place for place, _ in parted)
    widest = max((lead for _, lead in parted), default=0.0)
    return {
        "rows": rows,
        "rows_equal": rows - len(parted),
        "share": equal / (rows * tokens),
        "widest_lead_where_parted": widest,
        "near_ties_only": widest <= NEAR_TIE,
    }


def _compiled(side: Decodes, first: Tensor) -> tuple[float | None, str | None]:
    """Return the seconds that compiling took, and why the side is left out, if it is."""
    try:
        seconds = decoders.compile_steps(side, first)
    except Exception as error:  # a compiler fails in as many ways as it has parts
        return None, f"compiling failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if seconds > decoders.LONGEST_COMPILATION:
        return seconds, f"compiling took {seconds:.0f} s, more than {decoders.LONGEST_COMPILATION:.0f}"
    return seconds, None


def _left_out(case: Case) -> dict[str, str]:
    """Return the sides that are not even tried, with the reason."""
    if transformers_version() is None:
        return dict.fromkeys(THEIRS, "transformers is not installed")
    if case.kind == "prefill":
        return {COMPILED: "transformers compiles the steps behind a prompt, not the prompt"}
    return {}


def _settings(run: DecodeRun) -> dict[str, Any]:
    """Return what the numbers depend on beside the case."""
    return {
        "sizes": run.sizes(),
        "rounds": run.rounds,
        "allocator": run.allocator,
        "backend": choose_backend(None)[0],
        "compiled_experts": GROUPED.removeprefix("transformers_"),
        "transformers": transformers_version(),
        "code": code_version(Path(__file__).parents[1], ROOMS),
        "environment": environment("cpu"),
    }


def _record(settings: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the whole result as plain data."""
    return {
        "schema": SCHEMA,
        "command": command_line(),
        "created": now(),
        "settings": {name: value for name, value in settings.items() if name != "environment"},
        "environment": settings["environment"],
        "rows": list(rows),
    }
