"""Bad input: one line that says what was given, exit code 2, no traceback, and nothing written or lost."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from gatewright.cli import main
from gatewright.training import loop
from tests.training.runs import train_argv, write_text

PREFIX = "gatewright: error: "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text that is good, and with what is not."""
    root = tmp_path_factory.mktemp("input")
    write_text(root / "text")
    (root / "empty.txt").write_bytes(b"")
    (root / "binary.bin").write_bytes(bytes(range(256)) * 64)
    (root / "little.txt").write_text("a few words, and no more\n" * 9, encoding="utf-8")
    (root / "nothing").mkdir()
    (root / "file").write_text("a file where a folder is wanted", encoding="utf-8")
    (root / "broken.toml").write_text("width = = 3\n", encoding="utf-8")
    (root / "typo.toml").write_text("[model]\nnum_expert = 8\n", encoding="utf-8")
    (root / "type.toml").write_text("[run]\ntokens = 'many'\n", encoding="utf-8")
    (root / "twice.toml").write_text("data_seed = 1\n[run]\ndata_seed = 2\n", encoding="utf-8")
    return root


@pytest.fixture(autouse=True)
def cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep built corpora out of the user's own cache, and the default corpus from being built."""
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(place / "cache"))


def contents(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2) -> str:
    """Run a command that has to be refused; return its one error line."""
    assert main(argv) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert [line for line in lines if line.startswith(PREFIX)] == lines[-1:]
    return lines[-1].removeprefix(PREFIX)


# What is given in place of good flags -> what the line has to say. {} stands for the folder of inputs.
TEXT = ["--data", "{}/text/alpha"]
BOTH: list[tuple[list[str], str]] = [
    (["--data", "{}/missing.txt"], "{}/missing.txt"),
    (["--data", "{}/text/alpha", "{}/missing"], "{}/missing"),
    (["--data", "{}/empty.txt"], "{}/empty.txt"),
    (["--data", "{}/nothing"], "{}/nothing"),
    (["--data", "{}/binary.bin"], "{}/binary.bin"),
    (["--data", "{}/little.txt"], "domain 'little' holds 225 bytes"),
    ([*TEXT, "--context", "100000", "--batch-tokens", "100000"], "less than one window of 100001"),
    (
        [*TEXT, "--num-experts", "2", "--num-selected", "4"],
        "num_selected 4 with num_experts 2; allowed: 1 to 2",
    ),
    (
        [*TEXT, "--num-experts", "8", "8", "8"],
        "num_experts has 3 values for 2 layers; allowed: one value, or",
    ),
    ([*TEXT, "--expert-width", "8,8,8"], "expert_width has 3 values for 2 layers"),
    ([*TEXT, "--num-layers", "0"], "num_layers 0; allowed: 1 or more"),
    ([*TEXT, "--head-dim", "7"], "head_dim 7; allowed: even numbers"),
    ([*TEXT, "--num-kv-heads", "3"], "num_heads 2 with num_kv_heads 3; allowed: key/value heads that divide"),
    ([*TEXT, "--moe-layers", "each:2"], "moe_layers 'each:2' is unknown; allowed: all, none, every:N"),
    ([*TEXT, "--moe-layers", "last:3"], "moe_layers 'last:3' with 2 layers; allowed: a number of at most 2"),
    (
        [*TEXT, "--batch-tokens", "4000"],
        "batch_tokens 4000 with context 256 and accumulation 1; allowed: a mul",
    ),
    ([*TEXT, "--accumulation", "3"], "batch_tokens 4096 with context 256 and accumulation 3"),
    (
        [*TEXT, "--schedule", "cosin"],
        "schedule 'cosin' is unknown; did you mean 'cosine'?; allowed: constant",
    ),
    ([*TEXT, "--device", "gpu"], "device 'gpu'; allowed: cpu, cuda or cuda:N"),
    ([*TEXT, "--device", "cpu:3"], "device 'cpu:3'; allowed: cpu, cuda or cuda:N"),
    ([*TEXT, "--device", "cuda:99"], "device 'cuda:99' is not there"),
    ([*TEXT, "--tokenizer", "byte"], "byte"),
    ([*TEXT, "--tokenizer", "bpe:12"], "bpe:12"),
    ([*TEXT, "--tokenizer", "{}/file"], "file is not a tokenizer.json"),
    ([*TEXT, "--precision", "fp16"], "--precision fp16; allowed: fp32 or bf16"),
    ([*TEXT, "--on-nonfinite", "ignore"], "--on-nonfinite ignore; allowed: stop or skip"),
    ([*TEXT, "--learnin-rate", "1"], "unknown flag --learnin-rate"),
    ([*TEXT, "--warmup-step", "1"], "unknown flag --warmup-step; did you mean '--warmup-steps'?"),
    ([*TEXT, "--tokens"], "--tokens needs a value; allowed: an integer"),
    ([*TEXT, "--tokens", "1.5"], "--tokens 1.5; allowed: an integer"),
    ([*TEXT, "--from", "{}/absent.toml"], "--from {}/absent.toml: no such file"),
    ([*TEXT, "--from", "{}/broken.toml"], "--from {}/broken.toml: not TOML"),
    (
        [*TEXT, "--from", "{}/typo.toml"],
        "{}/typo.toml: unknown key 'num_expert'; did you mean 'num_experts'?",
    ),
    ([*TEXT, "--from", "{}/type.toml"], "{}/type.toml: tokens = 'many'; allowed: an integer"),
    ([*TEXT, "--from", "{}/twice.toml"], "{}/twice.toml: 'data_seed' is set twice"),
    ([*TEXT, "--threads", "-1"], "threads -1; allowed: "),
]


@pytest.mark.parametrize("command", ["train", "race"])
@pytest.mark.parametrize(("flags", "line"), BOTH, ids=[" ".join(flags[-2:]) for flags, _ in BOTH])
def test_a_run_that_cannot_be(
    command: str, flags: list[str], line: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = [word.replace("{}", str(place)) for word in flags]
    before = contents(place)
    said = refused(capsys, [command, *given, "--out", str(tmp_path / "out")])
    assert line.replace("{}", str(place)) in said
    assert not (tmp_path / "out").exists()
    left = {k: v for k, v in contents(place).items() if "/cache/" not in k}
    assert left == {k: v for k, v in before.items() if "/cache/" not in k}


@pytest.mark.parametrize("command", ["train", "race"])
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["mixtrall"], "mixtrall"),
        (["glam"], "glam"),
        (["vmoe"], "vmoe"),
        (["mixtral", "olmoe"], "'olmoe' does not belong to a flag"),
        (["olmoe", "--num-kv-heads", "1"], "unknown flag --num-kv-heads"),
        (["switch", "--num-selected", "2"], "unknown flag --num-selected"),
        (["switch", "--activation", "gelo"], "activation 'gelo' is unknown; did you mean 'gelu'?"),
        (["switch", "--capacity-factor", "0"], "capacity_factor 0.0; allowed: above 0"),
        (["switch", "--init-scale", "-1"], "init_scale -1.0; allowed: above 0"),
        (["olmoe", "--z-weight", "-1"], "z_weight -1.0; allowed: 0 or more"),
    ],
)
def test_words_and_papers(
    command: str, words: list[str], line: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = [command, *words, "--data", str(place / "text/alpha"), "--out", str(tmp_path / "out")]
    assert line in refused(capsys, argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--experts", "4,0"], "experts (4, 0); allowed: numbers of 1 or more"),
        (["--experts", "3"], "experts 3 with an active width of 256"),
        (["--experts", "a"], "--experts a; allowed: one or more values, each an integer"),
        (["--data-fraction", "0.5,2"], "data_fraction (0.5, 2.0); allowed: shares above 0, up to 1"),
        (["--experts", "4", "--triangle"], "--triangle and --experts together"),
        (["--moe-layers", "none"], "the model has no sparse layer"),
        (["--seeds", "0"], "seeds 0; allowed: 1 or more"),
        (["--fraction", "0"], "fraction 0.0; allowed: above 0, up to 1"),
        (["--against", "both"], "--against both; allowed: active or total"),
        (["--triangel"], "unknown flag --triangel; did you mean '--triangle'?"),
    ],
)
def test_races_that_cannot_be(
    flags: list[str], line: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    argv = ["race", "mixtral", "--data", str(place / "text/alpha"), *flags, "--out", str(out)]
    assert line in refused(capsys, argv)
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "race"])
def test_a_file_where_the_folder_belongs(
    command: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in ("file", "file/below", "file/far/below"):
        argv = [command, "--data", str(place / "text/alpha"), "--out", str(tmp_path / out)]
        for more in ([], ["--resume"]):
            said = refused(capsys, [*argv, *more])
            assert said.startswith(f"{tmp_path / 'file'} is a file; allowed: a folder")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_used_folder_keeps_what_it_holds(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    out, data = tmp_path / "run", [str(place / "text/alpha")]
    argv = train_argv(data, out, 4)
    assert main(argv) == 0
    capsys.readouterr()
    held = contents(out)
    assert len(held) > 8
    other = str(place / "text/beta")
    for given, line in (
        (argv, f"{out} already holds a run; continue it with --resume, or give another --out"),
        (["race", *argv[1:]], "already holds a run"),
        ([*argv, "--resume", "--width", "32"], "width is 32 but the run in "),
        ([*argv, "--resume", "--learning-rate", "0.5"], "learning_rate is 0.5 but the run in "),
        ([*argv, "--resume", "--schedule", "cosine"], "schedule is cosine but the run in "),
        ([*argv, "--resume", "--data", other], f"data is ['{other}'] but the run in "),
        (["train", "olmoe", "--data", *data, "--out", str(out), "--resume"], "but the run in "),
    ):
        assert line in refused(capsys, given)
        assert contents(out) == held


def test_text_that_changed_under_a_run_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    (data,) = write_text(tmp_path / "text", ("own",))
    argv = train_argv([data], tmp_path / "run", 4)
    assert main(argv) == 0
    held = contents(tmp_path / "run")
    write_text(tmp_path / "text", ("other", "own"))
    capsys.readouterr()
    assert "the checkpoint was trained on other text" in refused(capsys, [*argv, "--resume"])
    assert contents(tmp_path / "run") == held


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gatewright.cli", *argv], capture_output=True, text=True, timeout=90
    )


def test_the_process_itself_says_one_line_and_exits(place: Path, tmp_path: Path):
    out = str(tmp_path / "out")
    for argv, code, line in (
        (["train", "--data", str(place / "missing"), "--out", out], 2, f"{place / 'missing'}"),
        (["race", "--num-expert", "4", "--out", out], 2, "did you mean '--num-experts'?"),
        (["trian"], 2, "unknown command 'trian'; did you mean 'train'?"),
    ):
        done = run(*argv)
        assert done.returncode == code
        assert done.stdout == ""
        assert done.stderr.startswith(PREFIX)
        assert done.stderr.count("\n") == 1
        assert line in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["eval", "{}/nothing"], "{}/nothing holds no run"),
        (["generate", "{}/nothing"], "{}/nothing holds no run"),
        (["plan", "mixtral-9x7b"], "mixtral-9x7b"),
        (["plan", "mixtral", "--num-experts", "2"], "num_selected 4 with num_experts 2"),
        (["data", "{}/missing"], "{}/missing"),
        (["data", "{}/empty.txt"], "{}/empty.txt"),
        (["papers", "--yaml"], "unknown flag --yaml"),
        (["reproduce", "race/quickstar"], "race/quickstar"),
    ],
)
def test_the_other_commands(argv: list[str], line: str, place: Path, capsys: pytest.CaptureFixture[str]):
    given = [word.replace("{}", str(place)) for word in argv]
    assert line.replace("{}", str(place)) in refused(capsys, given)
