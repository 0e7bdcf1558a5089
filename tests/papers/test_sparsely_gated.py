"""The language model of 2017: published columns, gates that start at 0, losses, and every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.cli import main
from gatewright.errors import UserError
from gatewright.evaluation.plan import plan
from gatewright.generation import generate
from gatewright.objectives import NextToken
from gatewright.papers.sparsely_gated import PUBLISHED, Settings, build, objective
from tests.training.runs import LOOP, write_text

# Tables 7 and 8: multiply-adds per time step and parameters without embedding and softmax, in millions.
COLUMNS = {
    "lstm-1024-512": (4.7, 4.7),
    "lstm-2048-512": (9.4, 9.4),
    "4xlstm-512": (8.4, 8.4),
    "moe-1-wide": (8.4, 8.4),
    "moe-1-deep": (8.4, 8.4),
    "moe-4": (8.4, 8.4),
    "moe-32": (8.4, 37.8),
    "moe-256": (8.6, 272.9),
    "moe-256-h": (8.4, 272.9),
    "moe-1024-h": (8.5, 1079.0),
    "moe-4096-h": (8.9, 4303.4),
    "2xlstm-8192-1024": (151.0, 151.0),
    "moe-34m": (33.8, 4313.9),
    "moe-143m": (142.7, 4371.1),
    "news-moe-256-h": (8.4, 272.9),
    "news-moe-1024-h": (8.5, 1079.0),
    "news-moe-4096-h": (8.6, 4303.4),
    "news-moe-16384-h": (8.8, 17201.0),
    "news-moe-65536-h": (9.2, 68791.0),
    "news-moe-131072-h": (9.7, 137577.6),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_plan_reproduces_the_papers_columns(name: str):
    found = plan(f"sparsely_gated/{name}")
    operations, parameters = COLUMNS[name]
    # Printed with one digit: 8.65 stands as 8.6 (MoE-256), 68791.05 as 68791.0; biases are ours.
    assert found.inner_operations / 1e6 == pytest.approx(operations, abs=0.055)
    assert found.inner_parameters / 1e6 == pytest.approx(parameters, abs=0.15)


def test_every_published_row_is_checked():
    assert [*PUBLISHED] == [f"sparsely_gated/{name}" for name in COLUMNS]


def test_moe_256_by_hand():
    # 256 experts of 2 x 512 x 1024, two LSTMs of 4 x 512 x 1024 and two biases of 4 x 512, two gate matrices.
    found = plan("sparsely_gated/moe-256")
    assert found.inner_parameters == 256 * 1_048_576 + 2 * (2_097_152 + 4096) + 2 * 256 * 512
    assert found.inner_operations == 4 * 1_048_576 + 2 * 2_097_152 + 2 * 256 * 512
    assert found.total_parameters == found.inner_parameters + 2 * 793_471 * 512
    assert "multiply-adds per token 8,650,752" in found.to_text()


def tokens(length: int = 33) -> torch.Tensor:
    return torch.randint(0, 257, (4, length), generator=torch.Generator().manual_seed(1))


def test_before_training_every_token_goes_to_the_first_experts_without_noise():
    torch.manual_seed(0)
    model: Any = build(Settings(num_experts=8, dropout=0.0))
    (router,) = model.routers().values()
    assert not bool(router.weight.any() or router.noise.weight.any())
    (record,) = model.eval()(tokens()).stats.values()
    assert record.counts.tolist() == [132] * 4 + [0] * 4
    # With noise all are equally likely: 132 x 4 / 8 = 66 each, five standard deviations of 5.7.
    (record,) = model.train()(tokens(), key=torch.tensor(0)).stats.values()
    assert all(abs(count - 66) < 29 for count in record.counts.tolist())


def test_the_objective_adds_each_mixture_s_losses():
    assert objective(Settings()) == NextToken(losses={"importance": 0.1, "load": 0.1})
    two = Settings(num_layers=3, importance_weight=0.2, load_weight=0.01)
    assert objective(two).losses == pytest.approx({"importance": 0.4, "load": 0.02})
    assert objective(Settings(gate="balanced")) == NextToken(losses={"threshold": 0.1})
    assert objective(Settings(moe_layers="none")).losses == {"importance": 0, "load": 0}


@pytest.mark.parametrize("gate", ["flat", "groups:4", "balanced"])
def test_every_gate_trains_and_continues_a_text(gate: str):
    torch.manual_seed(0)
    settings = Settings(num_experts=16, gate=gate)
    model: Any = build(settings)
    loss = objective(settings)(model(tokens()[:, :-1], key=torch.tensor(0)), tokens()[:, 1:])
    loss.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    (router,) = model.routers().values()
    assert float(router.weight.grad.abs().sum()) > 0
    model.eval()
    whole, cache = model(tokens()).logits, model.new_cache(4)
    pieces = [model(tokens()[:, i : i + 1], cache).logits for i in range(33)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["flat", "groups:4"])
def test_generation_with_the_state_is_generation_without(gate: str):
    torch.manual_seed(1)
    settings = Settings(width=32, num_experts=16, expert_width=16, gate=gate, context=40)
    model: Any = build(settings)
    with torch.no_grad():
        model.head.weight.mul_(4)
        for router in model.routers().values():
            router.weight.normal_()
    # Beyond the context, too: the text then goes on from its last half.
    with_state = generate(model, [5, 250, 17], max_new_tokens=64, seed=3)
    assert with_state == generate(model, [5, 250, 17], max_new_tokens=64, seed=3, cache=False)
    assert len(set(with_state)) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "group:4"}, "gate 'group:4' is unknown; allowed: flat, groups:A"),
        ({"gate": "groups:"}, "gate 'groups:' is unknown"),
        ({"gate": "groups:5"}, "num_groups 5 with num_experts 64"),
        ({"num_selected": 1}, "num_selected 1|K = 1|constant"),
        ({"dropout": -0.1}, "dropout -0.1; allowed: 0 or more"),
    ],
)
def test_settings_that_cannot_be_built(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        build(Settings(**changes))
    assert "\n" not in str(caught.value)


def test_all_layers_of_a_dense_model_are_dense():
    model: Any = build(Settings(moe_layers="none", ffn_width=(0, 512)))
    assert model.routers() == {}
    assert model.layers[0].feed_forward is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the paper."""
    home = tmp_path_factory.mktemp("gated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEWRIGHT_CACHE", str(home / "cache"))
        patch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)
        model = {"width": 16, "num_experts": 8, "num_selected": 2, "expert_width": 16, "context": 16}
        settings = model | LOOP | {"tokens": 640, "out": home / "run"}
        flags = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        assert main(["train", "sparsely_gated", "--data", *write_text(home / "text"), *flags]) == 0
    return home / "run"


def test_a_run_trains_and_is_reported(run: Path):
    record = json.loads((run / "train.json").read_text())["runs"][0]["sides"][0]
    assert record["routers"] == ["layers.1.router"]
    assert record["specialisation"]["num_selected"] == 2
    page = (run / "report.html").read_text()
    assert "layers.1.router" in page


@pytest.mark.parametrize("command", ["eval", "generate", "plan"])
def test_commands_take_the_run(
    run: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(run.parent / "cache"))
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)
    more = ["--max-new-tokens", "40", "--prompt", "ab"] if command == "generate" else []
    assert main([command, str(run), "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    if command == "eval":
        assert 0 < found["bits_per_byte"] < 9
    elif command == "generate":
        # More than the context of 16: the text goes on from its last half.
        assert found["new_tokens"] == 40 or found["text"]
    else:
        assert found["paper"] == "sparsely_gated"
        assert found["kv_cache_gb"] == pytest.approx(2 * 2 * (16 + 16) / 1e9)
