"""gatewright distill: teacher, student and twin from end to end, stops and kills, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gatewright.cli import main
from gatewright.errors import UserError
from gatewright.evaluation import compression, gain_kept
from gatewright.experiments.distill import DistillRun, distill, sentence, student_run
from gatewright.experiments.twin import dense_twin
from gatewright.papers import get_paper
from gatewright.training.distiller import copy_non_experts
from gatewright.training.load import load_run
from tests.training.runs import LOOP, final_digest, read_log

Server = Callable[..., dict[str, Any]]
MODEL = {
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "expert_width": 16,
    "ffn_width": 16,
    "context": 16,
}


@pytest.fixture(autouse=True)
def allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process's memory as it is."""
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)


def teach(server: Server, data: list[str], out: Path, *more: str) -> Path:
    settings = LOOP | MODEL | {"tokens": 20 * LOOP["batch_tokens"], "out": out}
    flags = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    reply = server(["train", "switch", "--data", *data, *flags, *more])
    assert reply["code"] == 0, reply["stderr"]
    return out


@pytest.fixture(scope="module")
def teacher(server: Server, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twenty steps with four experts."""
    return teach(server, data, tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def distilled(server: Server, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The student's folder and what the command printed."""
    out = tmp_path_factory.mktemp("student") / "run"
    reply = server(["distill", str(teacher), "--out", str(out), "--json"])
    assert reply["code"] == 0, reply["stderr"]
    return out, json.loads(reply["stdout"])


def test_the_three_figures_and_what_follows_from_them(distilled: tuple[Path, Any], capsys: Any):
    out, printed = distilled
    record = json.loads((out / "distill.json").read_text())
    assert {**printed, "out": None, "stopped": None} == {**record, "out": None, "stopped": None}
    models = record["models"]
    bits = {name: own["bits_per_byte"] for name, own in models.items()}
    assert record["gain_kept_percent"] == gain_kept(bits["student"], bits["teacher"], bits["twin"])
    sizes = {name: own["parameters"] for name, own in models.items()}
    assert sizes["student"] == sizes["twin"] < sizes["teacher"]
    assert record["compression_percent"] == compression(sizes["student"], sizes["teacher"])
    assert [own["tokens"] for own in models.values()] == [20 * 64] * 3
    assert record["sentence"] == sentence(record["gain_kept_percent"], record["compression_percent"], bits)
    # The student is a run: it is evaluated by its folder, and gives the same figure.
    code = main(["eval", str(out), "--eval-bytes", str(LOOP["eval_bytes"]), "--batch-size", "4", "--json"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] == bits["student"]
    assert main(["generate", str(out), "--prompt", "ab", "--max-new-tokens", "4"]) == 0
    train = json.loads((out / "train.json").read_text())["runs"][0]["sides"][0]
    assert train["final"]["valid_bpb"] == pytest.approx(bits["student"], abs=1e-9)


def test_every_weight_is_named_once(distilled: tuple[Path, Any], teacher: Path):
    out, _ = distilled
    start = json.loads((out / "distill.json").read_text())["start"]
    student = load_run(out).model
    names = [name for name, _ in student.named_parameters()]
    assert sorted([*start["copied"], *start["new"]]) == sorted(names)
    found = copy_non_experts(load_run(teacher).model, student)
    assert [*found.copied] == start["copied"]
    assert start["new"] == ["layers.1.feed_forward.w_in", "layers.1.feed_forward.w_down"]


def test_a_kill_in_the_student_and_a_stop_in_the_twin_change_nothing(
    server: Server, teacher: Path, distilled: tuple[Path, Any], tmp_path: Path
):
    golden, _ = distilled
    out = tmp_path / "student"
    argv = ["distill", str(teacher), "--out", str(out)]
    assert server(argv, signal_at=["SIGKILL", 12])["code"] == -signal.SIGKILL
    assert not (out / "twin").exists()
    # The student goes on from step 7; only the twin still comes to its step 3.
    reply = server([*argv, "--resume"], signal_at=["SIGTERM", 3])
    assert (reply["code"], "--resume` continues" in reply["stdout"]) == (130, True)
    assert "twin: " in reply["stderr"]
    assert not (out / "distill.json").exists()
    reply = server([*argv, "--resume"])
    assert reply["code"] == 0, reply["stderr"]
    for folder in ("", "twin"):
        assert final_digest(out / folder) == final_digest(golden / folder)
        assert read_log(out / folder) == read_log(golden / folder)
    results = [json.loads((own / "distill.json").read_text()) for own in (out, golden)]
    assert [own["models"]["student"]["bits_per_byte"] for own in results] == [
        results[1]["models"]["student"]["bits_per_byte"]
    ] * 2
    # Other ways to teach are another student.
    reply = server([*argv, "--resume", "--teacher-weight", "0.5"])
    assert (reply["code"], "begun with 0.25" in reply["stderr"]) == (2, True)
    reply = server(argv)
    assert (reply["code"], "already holds a run" in reply["stderr"]) == (2, True)


def test_a_twin_that_is_there_is_taken(
    server: Server, teacher: Path, distilled: tuple[Path, Any], tmp_path: Path
):
    golden, printed = distilled
    twin = golden / "twin"
    argv = ["distill", str(teacher), "--twin", str(twin), "--no-copy", "--json"]
    reply = server([*argv, "--tokens", "640", "--out", str(tmp_path / "short")])
    found = json.loads(reply["stdout"])
    assert not (tmp_path / "short" / "twin").exists()
    assert found["models"]["twin"]["bits_per_byte"] == printed["models"]["twin"]["bits_per_byte"]
    assert found["models"]["student"]["tokens"] == 640
    assert found["start"]["copied"] == []
    with pytest.raises(UserError, match="is no plain model of the student's shape; allowed: a dense twin"):
        distill(teacher, DistillRun(out=str(tmp_path / "x"), twin=str(teacher)))


def test_what_cannot_be_distilled_is_said(
    teacher: Path, distilled: tuple[Path, Any], tmp_path: Path, capsys: Any
):
    out, _ = distilled
    for argv, line in (
        ([], "RUN is missing; give the --out folder of a sparse run"),
        ([tmp_path], "holds no run"),
        ([out], "the run is dense; allowed: a sparse one"),
        ([teacher, "--out", teacher], "is the teacher's own folder"),
        ([teacher, "--teacher-weight", "2"], "teacher_weight 2.0; allowed: 0 to 1"),
        ([teacher, "--teacher-wieght", "2"], "did you mean '--teacher-weight'"),
        ([teacher, "--tokens", "0", "--out", tmp_path / "no"], "tokens 0; allowed: 1 or more"),
    ):
        assert main(["distill", *map(str, argv)]) == 2
        assert line in capsys.readouterr().err


def test_a_teacher_whose_text_has_changed_is_refused(
    server: Server, teacher: Path, data: list[str], tmp_path: Path
):
    own = tmp_path / "text"
    own.mkdir()
    for path in Path(data[0]).iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    taught = teach(server, [str(own)], tmp_path / "teacher")
    (own / "more.txt").write_text("words that were not there when the teacher learned. " * 40)
    reply = server(["distill", str(taught), "--out", str(tmp_path / "student")])
    assert reply["code"] == 2
    assert "was trained on other text" in reply["stderr"]


def test_an_encoder_decoder_is_refused_by_name(teacher: Path):
    held, paper = load_run(teacher), get_paper("switch_t5")
    run = dataclasses.replace(held.run, paper="switch_t5")
    other = dataclasses.replace(held, run=run, settings=paper.Settings())
    with pytest.raises(UserError, match="'switch_t5' is an encoder-decoder"):
        student_run(other, DistillRun())


def test_a_student_s_run_is_the_teacher_s_but_for_what_is_said(teacher: Path):
    held = load_run(teacher)
    limited = dataclasses.replace(held, run=dataclasses.replace(held.run, minutes=3.0, until_loss=1.5))
    run = student_run(limited, DistillRun(out="x", tokens=128, seed=5))
    assert run.model == dense_twin("switch", held.settings)
    assert (run.tokens, run.seed, run.out, run.minutes, run.until_loss) == (128, 5, "x", None, None)
    same = dataclasses.replace(
        held.run, model=run.model, tokens=128, seed=5, out="x", resume=False, threads=0, device="cpu"
    )
    assert run == same


def test_the_sentence_says_when_there_is_nothing_to_keep():
    bits = {"teacher": 2.0, "student": 1.9, "twin": 1.95}
    assert "no gain to keep" in sentence(None, 90.0, bits)
    assert sentence(50.0, 90.0, {"teacher": 2.0, "student": 2.1, "twin": 2.2}) == (
        "the student keeps 50 % of the teacher's gain over the plain twin (0.2000 bits per byte) and is "
        "90.0 % smaller"
    )
