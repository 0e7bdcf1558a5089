"""Every command from end to end on a few kilobytes of text, and what each says to bad input."""

from __future__ import annotations

import json
import random
import signal
import tomllib
from pathlib import Path

import pytest

from gatewright.cli import main

WORDS = "the and of light darkness water land king said unto them earth day night good was called".split()
MODEL = "--context 64 --num-experts 8 --num-selected 2 --expert-width 16 --width 32 --head-dim 16".split()
RUN = "--batch-tokens 1024 --warmup-steps 2 --eval-bytes 4000 --evaluations 2".split()


def call(capsys, *argv: str | Path) -> tuple[int, str, str]:
    """Run a command line in this process; return exit code, stdout and stderr."""
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with two small domains and a trained run ("run")."""
    folder = tmp_path_factory.mktemp("home")
    draw = random.Random(0)
    for domain, line in (
        ("verse", lambda: " ".join(draw.choices(WORDS, k=12))),
        ("sums", lambda: f"{draw.random()} +"),
    ):
        (folder / domain).mkdir()
        for number in range(40):
            text = "\n".join(line() for _ in range(40))
            (folder / domain / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def own_cache(home: Path, monkeypatch):
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(home / "cache"))
    prepare(monkeypatch)


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Leave out what has tests of its own: the report, which takes seconds, and the allocator."""
    patch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)
    patch.setattr("gatewright.training.loop.write_report", lambda record, out: out / "report.html")


def data(home: Path) -> list[str]:
    return ["--data", str(home / "verse"), str(home / "sums")]


@pytest.fixture(scope="session")
def trained(home: Path, request) -> Path:
    """A run of twelve steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEWRIGHT_CACHE", str(home / "cache"))
        prepare(patch)
        argv = [
            "train",
            "mixtral",
            *data(home),
            *MODEL,
            *RUN,
            "--tokens",
            "12288",
            "--out",
            str(home / "run"),
        ]
        assert main(argv) == 0
    return home / "run"


def test_train_writes_settings_log_and_result(trained: Path):
    for name in ("run.toml", "train.json", "log.jsonl", "tokenizer.json"):
        assert (trained / name).is_file(), name
    tables = tomllib.loads((trained / "run.toml").read_text())
    assert tables["run"]["paper"] == "mixtral"
    assert tables["model"]["num_experts"] == 8


def test_a_written_run_toml_gives_the_same_run_again(trained: Path, home: Path, capsys):
    argv = ["train", "--from", trained / "run.toml", "--out", home / "again", "--json"]
    code, out, _ = call(capsys, *argv)
    assert code == 0
    assert tomllib.loads((home / "again" / "run.toml").read_text())["model"]["context"] == 64
    first = json.loads((trained / "train.json").read_text())["runs"][0]["sides"][0]
    assert json.loads(out)["bits_per_byte"] == first["final"]["valid_bpb"]


def test_eval_prints_every_domain(trained: Path, capsys):
    code, out, _ = call(capsys, "eval", trained, "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result["domains"]) == {"verse", "sums"}
    assert result["step"] == 12
    code, out, _ = call(capsys, "eval", trained)
    assert f"{result['bits_per_byte']:.4f} bits per byte" in out


def test_inspect_shows_where_a_run_sends_its_tokens(trained: Path, home: Path, capsys, monkeypatch):
    monkeypatch.setattr("gatewright.experiments.inspect_model.write_report", lambda record, out: out)
    code, out, _ = call(capsys, "inspect", trained, "--out", home / "seen", "--tokens", "512", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result["domains"]) == {"verse", "sums"}
    assert result["tokens"] == 1024
    assert [router["num_experts"] for router in result["routers"]] == [8] * len(result["routers"])
    head, first, *_ = (home / "seen" / "trace.jsonl").read_text().splitlines()
    assert json.loads(head)["routers"] == [router["name"] for router in result["routers"]]
    assert len(json.loads(first)["experts"][0]) == 2
    code, _, err = call(capsys, "inspect", home)
    assert (code, "runs below it" in err or "holds neither run.toml nor config.json" in err) == (2, True)


def test_generate_streams_or_returns_the_same_text(trained: Path, capsys):
    argv = ["generate", trained, "--prompt", "light", "--max-new-tokens", "20", "--seed", "3"]
    code, out, err = call(capsys, *argv)
    assert (code, err) == (0, "")
    assert out.startswith("light")
    code, whole, _ = call(capsys, *argv, "--json")
    result = json.loads(whole)
    assert code == 0
    assert result["prompt"] + result["text"] + "\n" == out
    assert 0 < result["new_tokens"] <= 20


def test_plan_of_a_run_a_size_and_a_changed_paper(trained: Path, capsys):
    code, out, _ = call(capsys, "plan", "mixtral-8x7b", "--json")
    whole = json.loads(out)
    assert code == 0
    assert (whole["total_parameters"], whole["active_parameters"]) == (46_702_792_704, 12_879_925_248)
    code, out, _ = call(capsys, "plan", trained, "--json", "--context", "32")
    assert json.loads(out)["settings"]["num_experts"] == 8
    assert json.loads(out)["context"] == 32
    code, out, _ = call(capsys, "plan", "mixtral", "--num-experts", "16", "--device-memory", "24", "--json")
    changed = json.loads(out)
    assert (changed["name"], changed["settings"]["num_experts"]) == ("mixtral, changed", 16)
    assert [device["memory_gb"] for device in changed["devices"]] == [24.0]
    assert call(capsys, "plan", "mixtral")[1].startswith("mixtral")


def test_papers_prints_the_lineage_or_one_record(capsys):
    code, out, _ = call(capsys, "papers")
    assert code == 0
    years = [int(line[:4]) for line in out.splitlines() if line[:4].isdigit()]
    assert (years[0], len(years), years) == (1991, 15, sorted(years))
    records = json.loads(call(capsys, "papers", "deepseek_v3", "--json")[1])["papers"]
    assert [record["id"] for record in records] == ["deepseek_v3"]
    assert len(records[0]["authors"]) > 100


def test_data_profiles_what_a_run_would_train_on(home: Path, capsys):
    code, out, err = call(capsys, "data", home / "verse", home / "sums", "--json")
    assert code == 0
    profile = json.loads(out)
    assert {domain["name"] for domain in profile["domains"]} == {"verse", "sums"}
    assert profile["documents"] == 80
    assert "validation" in err


def test_reproduce_lists_what_there_is(capsys):
    code, out, _ = call(capsys, "reproduce", "--json")
    assert code == 0
    assert "race/quickstart" in json.loads(out)["targets"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("train nobody", ["'nobody'", "gatewright papers"]),
        ("train mixtrl", ["did you mean 'mixtral'"]),
        ("train glam", ["planned"]),
        ("train local_experts", ["does not train on text", "gatewright reproduce"]),
        ("race local_experts", ["does not train on text", "gatewright reproduce"]),
        ("plan local_experts", ["does not train on text", "gatewright reproduce"]),
        (
            "train --num-exprts 4",
            ["--num-exprts", "did you mean '--num-experts'", "gatewright train mixtral --help"],
        ),
        ("train --num-experts 2 --data {home}/verse --out {home}/bad", ["num_selected 4", "num_experts 2"]),
        ("train --data {home}/nowhere --out {home}/bad", ["nowhere", "does not exist"]),
        ("train --data {home}/empty.txt --out {home}/bad", ["empty.txt"]),
        ("train --data {home}/binary.bin --out {home}/bad", ["binary.bin"]),
        ("train --data {home}/little.txt --out {home}/bad", ["little"]),
        ("train --schedule cosin", ["did you mean 'cosine'"]),
        ("train --from {home}/typo.toml", ["typo.toml", "'num_expert'", "did you mean 'num_experts'"]),
        ("train --from {home}/nowhere.toml", ["nowhere.toml: no such file"]),
        ("train --out {home}/run", ["already holds a run", "--resume"]),
        ("train --device cuda:99 --data {home}/verse --out {home}/bad", ["cuda:99"]),
        ("train --tokenizer bpe:x --data {home}/verse --out {home}/bad", ["bpe:x"]),
        ("race mixtral --fraction 1.5", ["fraction 1.5", "up to 1"]),
        ("race mixtral --experts 2,x", ["--experts 2,x", "an integer"]),
        ("eval", ["OUT is missing"]),
        ("eval {home}/nowhere", ["holds no run"]),
        ("generate {home}/run --top-p 2", ["top_p 2.0"]),
        ("generate {home}/nowhere", ["holds no run"]),
        ("plan", ["NAME is missing", "mixtral-8x7b"]),
        ("plan mixtral-8x7", ["did you mean 'mixtral-8x7b'"]),
        ("plan mixtral-8x7b --dtype fp7", ["fp7", "bf16"]),
        ("papers mixtrl", ["did you mean 'mixtral'"]),
        ("data {home}/nowhere", ["does not exist"]),
        ("reproduce race/quick", ["race/quickstart"]),
        ("doctor now", ["'now' does not belong"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    home: Path, trained: Path, capsys, line: str, parts: list[str]
):
    (home / "empty.txt").write_text("")
    (home / "binary.bin").write_bytes(bytes(range(256)) * 20)
    (home / "little.txt").write_text("In the beginning was the word.")
    (home / "typo.toml").write_text("[model]\nnum_expert = 4\n")
    before = (trained / "train.json").read_bytes()
    code, out, err = call(capsys, *line.format(home=home).split())
    assert code == 2, err
    assert out == ""
    errors = [text for text in err.splitlines() if text.startswith("gatewright: error: ")]
    assert len(errors) == 1
    assert err.splitlines()[-1] == errors[0]
    assert "Traceback" not in err
    assert [part for part in parts if part not in errors[0]] == [], errors[0]
    assert (trained / "train.json").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["race", "train", "eval", "generate", "plan", "papers", "data", "doctor", "reproduce"]
)
def test_every_command_has_help_on_stdout(capsys, name: str):
    code, out, err = call(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: gatewright {name}")
    assert "--json" in out


def test_ctrl_c_saves_and_resume_goes_on(home: Path, capsys, monkeypatch):
    from gatewright.training.trainer import Trainer

    step, before = Trainer.advance, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupted(self: Trainer):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    out = home / "interrupted"
    argv = ["train", *data(home), *MODEL, *RUN, "--tokens", "6144", "--out", str(out), "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        code, text, err = call(capsys, *argv)
    result = json.loads(text)
    assert (code, result["stopped"], result["steps"]) == (130, True, 3), err
    code, text, _ = call(capsys, *argv, "--resume")
    assert (code, json.loads(text)["stopped"], json.loads(text)["steps"]) == (0, False, 6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
