"""A race from end to end at a tiny size: turns, the common text, kills, stops, every block of the result."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gatewright.data import Corpus
from gatewright.data.stream import TokenStream
from gatewright.experiments import race as room
from gatewright.experiments.race import Lane, race
from gatewright.experiments.race_run import RaceRun, race_sides
from gatewright.papers.mixtral import Settings
from gatewright.training.trainer import Trainer
from tests.training.runs import LOOP, TINY, final_digest, read_log, timeless

Server = Callable[..., dict[str, Any]]

RACE: dict[str, Any] = {
    **LOOP,
    "tokens": 20 * LOOP["batch_tokens"],
    "fraction": 0.6,
    "turn_steps": 3,
    "checkpoint_every": 6,
    "sparse_rate": 3e-3,
    "dense_rate": 3e-3,
}


def tiny_race(data: list[str], out: Path, **changes: Any) -> RaceRun:
    model = Settings(**TINY | {"num_layers": 1, "expert_width": 16})
    return RaceRun(**RACE | changes, model=model, data=tuple(data), out=str(out))


def race_argv(data: list[str], out: Path, *more: str) -> list[str]:
    settings = TINY | RACE | {"num_layers": 1, "expert_width": 16, "out": out}
    flags = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return ["race", "mixtral", "--data", *data, *flags, *more]


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and takes longer than these races."""
    monkeypatch.setattr(room, "write_report", lambda *_: None)


def test_all_sides_see_the_same_batches_by_index(data: list[str], corpus: Corpus):
    streams = [
        Trainer(side.run, corpus).stream for side in race_sides(tiny_race(data, Path("o"), triangle=True), 0)
    ]
    streams += [Trainer(side.run, corpus).stream for side in race_sides(tiny_race(data, Path("o")), 3)]
    assert len(streams) == 5
    for index in (0, 1, 7, 40):
        first = streams[0].batch(index)
        assert all((stream.batch(index) == first).all() for stream in streams)


@pytest.mark.usefixtures("without_report")
def test_turns_alternate_and_rotate_and_each_side_takes_every_batch_once(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    turns: list[tuple[int, str]] = []
    taken: dict[str, list[int]] = defaultdict(list)
    at_work = [""]
    turn, batch = Lane.turn, TokenStream.batch

    def noted_turn(self: Lane, number: int, until: float) -> None:
        turns.append((number, self.side.name))
        at_work[0] = self.side.name
        turn(self, number, until)

    def noted_batch(self: TokenStream, index: int) -> Any:
        taken[at_work[0]].append(index)
        return batch(self, index)

    monkeypatch.setattr(Lane, "turn", noted_turn)
    monkeypatch.setattr(TokenStream, "batch", noted_batch)
    record = race(tiny_race(data, tmp_path / "race", triangle=True)).record
    # 20 steps in turns of 3: seven rounds. Each begins one side later than the one before.
    order = ["dense-active", "dense-total", "sparse"]
    expected = [(n, order[(n + place) % 3]) for n in range(7) for place in range(3)]
    assert turns == expected
    assert taken == {"dense-active": [*range(20)], "dense-total": [*range(20)], "sparse": [*range(12)]}
    sides = {side["name"]: side for side in record["runs"][0]["sides"]}
    # Each round takes every side to the same share of its own budget: 20 n / 7 and 12 n / 7, rounded down.
    for name, budget in (("dense-active", 20), ("sparse", 12)):
        assert [t["round"] for t in sides[name]["turns"]] == [*range(7)]
        done = [math.floor(budget * n / 7 + 1e-6) for n in range(8)]
        steps = [t["steps"] for t in sides[name]["turns"]]
        assert steps == [b - a for a, b in itertools.pairwise(done)]
        total = sum(t["seconds"] for t in sides[name]["turns"])
        assert total == pytest.approx(sides[name]["train_seconds"])
    assert record["comparisons"][0]["step_time_ratio"]["rounds"] == 7


def without_clock(record: dict[str, Any]) -> Any:
    """Return what of a race's record neither the clock nor the moment moves."""
    clocked = {"train_seconds", "tokens_per_second", "second_share", "step_time_ratio", "speedup", "created"}
    clocked |= {"command", "sentence", "environment", "detail", "held"}

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in clocked}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(timeless(record))


SIDES = ("seed0/dense", "seed0/sparse")


@pytest.fixture(scope="module")
def golden(server: Server, data: list[str], shared: Path) -> tuple[Path, dict[str, Any]]:
    """A race that nothing disturbs, and the server's reply."""
    out = shared / "golden-race"
    reply = server(race_argv(data, out), kill_event=0)
    assert reply["code"] == 0, reply["stderr"]
    return out, reply


def assert_golden(out: Path, golden: tuple[Path, dict[str, Any]]) -> None:
    for side in SIDES:
        assert final_digest(out / side) == final_digest(golden[0] / side)
        assert read_log(out / side) == read_log(golden[0] / side)
    records = [json.loads((folder / "race.json").read_text()) for folder in (out, golden[0])]
    assert without_clock(records[0]) == without_clock(records[1])
    assert [p.name for p in out.rglob(".*") if p.name != ".lock"] == []


def test_a_killed_race_resumes_bit_for_bit_with_its_rounds_paired(
    server: Server, data: list[str], tmp_path: Path, golden: tuple[Path, dict[str, Any]]
):
    events = golden[1]["events"]
    assert events > 60
    # At the start; between the saves of the two sides; anywhere.
    draw = random.Random(3)
    for number, event in enumerate([3, 30, *(draw.randrange(events) for _ in range(4)), events]):
        out = tmp_path / str(number)
        assert server(race_argv(data, out), kill_event=event)["code"] == -signal.SIGKILL
        reply = server(race_argv(data, out, "--resume"))
        assert reply["code"] == 0, reply["stderr"]
        assert_golden(out, golden)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_race_has_no_verdict_and_goes_on(
    name: str, server: Server, data: list[str], tmp_path: Path, golden: tuple[Path, dict[str, Any]]
):
    out = tmp_path / "race"
    reply = server(race_argv(data, out, "--json"), signal_at=[name, 8])
    assert reply["code"] == 130
    told = json.loads(reply["stdout"])
    assert told["stopped"] is True
    assert told["comparisons"] == []
    assert told["verdict"]["held"] is None
    record = json.loads((out / "race.json").read_text())
    # The round is finished, so that both sides stand at the same share.
    steps = {side["name"]: side["steps"] for side in record["runs"][0]["sides"]}
    assert steps == {"dense": 8, "sparse": 5}
    assert server(race_argv(data, out, "--resume"))["code"] == 0
    assert_golden(out, golden)


@pytest.mark.usefixtures("without_report")
def test_a_finished_race_resumed_trains_nothing(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tiny_race(data, tmp_path / "race")
    first = race(run).record
    held = {p: p.stat().st_mtime_ns for p in (tmp_path / "race").glob("*/*/checkpoints/*/*")}
    assert held
    (tmp_path / "race/race.json").unlink()
    monkeypatch.setattr(Trainer, "advance", lambda self: pytest.fail("a finished side was trained"))
    again = race(dataclasses.replace(run, resume=True)).record
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "race").glob("*/*/checkpoints/*/*")} == held
    assert without_clock(again) == without_clock(first)
    assert (tmp_path / "race/race.json").exists()


def test_a_triangle_of_two_seeds_end_to_end_with_its_report(data: list[str], tmp_path: Path):
    record = race(tiny_race(data, tmp_path / "race", triangle=True, seeds=2, first_seed=4)).record
    assert json.loads((tmp_path / "race/race.json").read_text()) == json.loads(json.dumps(record))
    assert [one["seed"] for one in record["runs"]] == [4, 5]
    names = ["dense-active", "dense-total", "sparse"]
    assert [[side["name"] for side in one["sides"]] for one in record["runs"]] == [names] * 2
    pairs = [(c["seed"], c["dense"], c["against"]) for c in record["comparisons"]]
    assert pairs == [(s, f"dense-{a}", a) for s in (4, 5) for a in ("active", "total")]
    assert record["verdict"]["seeds"] == 2
    assert record["verdict"]["dense"] == "dense-active"
    assert [p["name"] for p in record["triangle"]["points"]] == names
    assert len(record["triangle"]["claims"]) == 4
    assert record["scaling"] is None
    assert record["small_data"] is None
    page = (tmp_path / "race/report.html").read_text(encoding="utf-8")
    assert "</html>" in page
    assert "better than a dense model of the same compute per token" in page
    sparse, dense = record["runs"][0]["sides"][2], record["runs"][0]["sides"][0]
    assert (dense["final"]["tokens"], sparse["final"]["tokens"]) == (1280, 768)
    assert [point["step"] for point in sparse["curve"]] == [3, 6, 9, 12]
    assert dense["routers"] == []
    assert dense["specialisation"] is None
    assert sparse["routers"] == ["layers.0.router"]
    for shares in sparse["load_over_time"]["routers"]["layers.0.router"]:
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert len(sparse["load_over_time"]["steps"]) == 12
    assert sparse["specialisation"]["chance"] == 0.5
    assert set(sparse["final"]["domains"]) == set(record["data"]["domains"]) == {"alpha", "beta"}


@pytest.mark.usefixtures("without_report")
def test_a_scaling_curve_end_to_end(data: list[str], tmp_path: Path):
    record = race(tiny_race(data, tmp_path / "race", experts=(2, 4, 8))).record
    assert [point["num_experts"] for point in record["scaling"]] == [2, 4, 8]
    sizes = [point["total_parameters"] for point in record["scaling"]]
    assert sizes == sorted(sizes)
    finals = {s["name"]: s["final"]["valid_bpb"] for s in record["runs"][0]["sides"]}
    assert [point["valid_bpb"] for point in record["scaling"]] == [finals[f"sparse-{n}"] for n in (2, 4, 8)]
    assert record["verdict"]["sparse"] == "sparse-8"
    assert record["triangle"] is record["small_data"] is None


@pytest.mark.usefixtures("without_report")
def test_a_small_data_curve_end_to_end(data: list[str], tmp_path: Path):
    record = race(tiny_race(data, tmp_path / "race", data_fraction=(0.25, 1.0))).record
    assert [(point["fraction"], point["kind"]) for point in record["small_data"]] == [
        (0.25, "dense"),
        (0.25, "sparse"),
        (1.0, "dense"),
        (1.0, "sparse"),
    ]
    assert [c["data_fraction"] for c in record["comparisons"]] == [0.25, 1.0]
    by_name = {s["name"]: s for s in record["runs"][0]["sides"]}
    assert by_name["dense-data0.25"]["final"] != by_name["dense-data1"]["final"]
    assert record["verdict"]["sparse"] == "sparse-data1"


@pytest.mark.usefixtures("without_report")
def test_recurrent_models_race(data: list[str], tmp_path: Path):
    from gatewright.papers.sparsely_gated import Settings as Gated

    model = Gated(width=16, num_experts=8, num_selected=2, expert_width=16, context=16)
    run = dataclasses.replace(tiny_race(data, tmp_path / "race"), paper="sparsely_gated", model=model)
    sides = {side["name"]: side for side in race(run).record["runs"][0]["sides"]}
    assert sides["dense"]["forward_flops_per_token"] == pytest.approx(
        sides["sparse"]["forward_flops_per_token"], rel=0.01
    )
    assert sides["dense"]["flops_by_part"]["recurrent"] == sides["sparse"]["flops_by_part"]["recurrent"] > 0
    # Two experts of 16 units and both gate matrices: 2 x 16 + 2 x 8 x 16 / 32.
    assert sides["dense"]["settings"]["ffn_width"] == (0, 40)


@pytest.mark.usefixtures("without_report")
def test_a_race_of_switch_drops_and_says_so(data: list[str], tmp_path: Path):
    from gatewright.papers.switch import Settings as Switch

    own = {k: v for k, v in TINY.items() if k not in ("num_kv_heads", "num_selected")}
    model = Switch(**own, moe_layers="last:1", capacity_factor=0.5)
    run = dataclasses.replace(tiny_race(data, tmp_path / "race"), paper="switch", model=model)
    sides = {side["name"]: side for side in race(run).record["runs"][0]["sides"]}
    dropped = sides["sparse"]["dropped_over_time"]["routers"]["layers.1.router"]
    # Half of an even share each: at least half of the assignments find no place.
    assert all(0.5 <= share < 1 for share in dropped)
    assert sides["dense"]["forward_flops_per_token"] == pytest.approx(
        sides["sparse"]["forward_flops_per_token"], rel=0.01
    )
