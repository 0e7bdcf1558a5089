"""A disk that is full, or with something in the way: one line, exit code 1, nothing lost that was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training.runs import final_digest, train_argv

Server = Callable[..., dict[str, Any]]


def test_a_disk_that_fills_up_costs_nothing_that_was_saved(server: Server, data: list[str], tmp_path: Path):
    out = tmp_path / "run"
    begun = [*train_argv(data, out, 12), "--checkpoint-every", "4"]
    assert server(begun, signal_at=["SIGINT", 5])["code"] == 130
    before, held = final_digest(out), sorted(p.name for p in (out / "checkpoints").iterdir())
    assert held == ["step-00000004", "step-00000005"]
    sizes = {p.name: p.stat().st_size for p in (out / "checkpoints/step-00000005").iterdir()}
    # Into run.toml's and the log's first bytes; state.json; amid the weights; one byte short of the moments.
    small = [
        1,
        300,
        sizes["state.json"] - 1,
        sizes["model.safetensors"] // 2,
        sizes["optimizer.safetensors"] - 1,
    ]
    for limit in small:
        reply = server([*begun, "--resume"], limit=limit)
        assert reply["code"] == 1, (limit, reply["stderr"])
        lines = [line for line in reply["stderr"].splitlines() if line.startswith("gatewright: error: ")]
        assert len(lines) == 1
        assert reply["stderr"].endswith(lines[0] + "\n")
        assert "Traceback" not in reply["stderr"]
        assert "File too large" in lines[0]
        assert sorted(p.name for p in (out / "checkpoints").iterdir()) == held
        assert final_digest(out) == before
        assert [p.name for p in out.rglob(".*") if p.name != ".lock"] == []
    assert server([*begun, "--resume"])["code"] == 0
    assert server(train_argv(data, tmp_path / "golden", 12, "--checkpoint-every", "4"))["code"] == 0
    assert final_digest(out) == final_digest(tmp_path / "golden")


def test_a_file_where_checkpoints_belong_is_one_line(server: Server, data: list[str], tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoints").write_text("in the way")
    reply = server(train_argv(data, out, 8))
    assert reply["code"] == 2
    (out / "tensorboard").write_text("in the way")
    (out / "checkpoints").unlink()
    reply = server(train_argv(data, out, 8))
    assert reply["code"] == 1
    assert reply["stderr"].splitlines()[-1].startswith("gatewright: error: cannot write the log in")
    assert "Traceback" not in reply["stderr"]
