"""One step: accumulation, what the balance loss sees, precision, and numbers that are not finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.errors import RunFailure
from gatewright.objectives.next_token import Loss
from gatewright.papers import mixtral, olmoe, switch
from gatewright.training import loop, train
from gatewright.training.trainer import Trainer
from tests.training.runs import TINY, advance, digest, fixed_trainer, tiny_run, train_argv

GOLDEN = Path(__file__).with_name("golden.json")


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_four_micro_batches_equal_one_batch_for_a_dense_model():
    # A large epsilon: else the first steps are signs of gradients, and one near 0 may have either.
    dense = {"moe_layers": "none", "adam_eps": 1e-4, "learning_rate": 1e-3}
    one, four = fixed_trainer(accumulation=1, **dense), fixed_trainer(accumulation=4, **dense)
    assert (one.micro_size, four.micro_size) == (4, 1)
    for _ in range(4):
        a, b = one.advance(), four.advance()
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-5)
    for name, weight in weights(one).items():
        assert torch.allclose(weight, weights(four)[name], rtol=0, atol=1e-6), name


def gradients_of(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_the_balance_loss_is_that_of_each_micro_batch():
    trainer = fixed_trainer(accumulation=2, balance_weight=0.5, batch_tokens=64)
    batch = torch.from_numpy(trainer.stream.batch(0))
    loss, counted = trainer._gradients(batch)
    found = gradients_of(trainer)

    def by_hand(parts: list[Tensor]) -> tuple[dict[str, Tensor], float, Tensor]:
        trainer.model.zero_grad()
        tasks, counts = [], torch.zeros(4, dtype=torch.int64)
        for rows in parts:
            output = trainer.model(rows[:, :-1])
            own = trainer.objective(output, rows[:, 1:])
            assert own.total.item() == pytest.approx(own.task.item() + 0.5 * own.balance.item(), rel=1e-6)
            (own.total / len(parts)).backward()
            tasks.append(own.task.item())
            counts += output.stats["layers.0.router"].counts
        return gradients_of(trainer), sum(tasks) / len(tasks), counts

    halves, mean, counts = by_hand([batch[:2], batch[2:]])
    whole, _, _ = by_hand([batch])
    assert loss.item() == pytest.approx(mean, rel=1e-6)
    assert torch.equal(counted["layers.0.router"]["counts"], counts)
    router = "layers.0.feed_forward.router.weight"
    assert torch.allclose(found[router], halves[router], rtol=0, atol=1e-8)
    # Its value changes with accumulation by definition: the loss is no mean over tokens.
    assert not torch.allclose(found[router], whole[router], rtol=0, atol=1e-5)


def poison(trainer: Trainer, at: tuple[int, ...], value: float = float("nan")) -> None:
    """Make the gradients of these steps (from 0) not finite while the loss stays as it is."""
    inner = trainer.objective

    def objective(output: Any, targets: Tensor) -> Loss:
        loss = inner(output, targets)
        if trainer.step in at:
            factor = torch.tensor(value) * trainer.model.head.weight.sum()
            return loss._replace(total=loss.total + factor - factor.detach())
        return loss

    trainer.objective = objective


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("embedding.weight", "layers.0.router"),
        ("layers.0.feed_forward.router.weight", "layers.0.router"),
        ("layers.0.feed_forward.experts.w_down", "layers.1.router"),
        ("layers.1.feed_forward.router.weight", "layers.1.router"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run_and_names_the_layer(
    parameter: str, layer: str, value: float
):
    trainer = fixed_trainer()
    advance(trainer, 1)
    with torch.no_grad():
        trainer.model.get_parameter(parameter).fill_(value)
    before = digest(trainer.checkpoint())
    with pytest.raises(RunFailure) as failure:
        trainer.advance()
    line = str(failure.value)
    assert line.startswith("step 2 of model: loss ")
    assert f"first seen in the logits of {layer}; the weights are those of the step before" in line
    assert "\n" not in line
    assert digest(trainer.checkpoint()) == before
    assert trainer.step == 1


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_gradients_alone_that_are_not_finite_stop_the_run(value: str):
    trainer = fixed_trainer()
    poison(trainer, (0,), float(value))
    before = weights(trainer)
    with pytest.raises(RunFailure, match=f"gradient norm {value}; first seen in the gradient of head"):
        trainer.advance()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
    assert not trainer.optimizer.state
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_skipped_step_leaves_weights_and_moments_and_goes_on():
    trainer = fixed_trainer(6, on_nonfinite="skip", log_every=2)
    poison(trainer, (2, 4, 5))
    records = [trainer.advance() for _ in range(2)]
    before = weights(trainer)
    moments = {k: v["step"].item() for k, v in enumerate(trainer.optimizer.state.values())}
    assert trainer.average is not None
    updates = trainer.average.updates
    records.append(trainer.advance())
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
    assert moments == {k: v["step"].item() for k, v in enumerate(trainer.optimizer.state.values())}
    assert trainer.average.updates == updates
    records += [trainer.advance() for _ in range(3)]
    assert [record["skipped"] for record in records] == [False, False, True, False, True, True]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    # Of steps 3 and 4 only the fourth counts; of 5 and 6 none does.
    losses = [entry["loss"] for entry in trainer.history.log]
    by_hand = [(records[0]["loss"] + records[1]["loss"]) / 2, records[3]["loss"]]
    assert losses[:2] == pytest.approx(by_hand, rel=1e-12)
    assert losses[2] is None
    assert [entry["skipped_steps"] for entry in trainer.history.log] == [0, 1, 2]
    json.dumps(trainer.checkpoint().state, allow_nan=False)


def test_a_run_that_skips_every_step_still_ends_in_a_result_and_a_report(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tiny_run(data, tmp_path / "run", steps=6, on_nonfinite="skip", log_every=2, evaluations=2)
    monkeypatch.setattr(loop, "Trainer", always_poisoned)
    record = train(run).record["runs"][0]["sides"][0]
    assert [entry["loss"] for entry in record["train_log"]] == [None] * 3
    assert "</html>" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    for line in (tmp_path / "run/log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def always_poisoned(*args: Any) -> Trainer:
    trainer = Trainer(*args)
    poison(trainer, tuple(range(100)))
    return trainer


def test_a_diverging_run_is_one_line_and_exit_code_1(
    server: Callable[..., dict[str, Any]], data: list[str], tmp_path: Path
):
    argv = train_argv(data, tmp_path / "run", 12, "--learning-rate", "1e30", "--clip", "0")
    reply = server([*argv, "--checkpoint-every", "1"])
    assert reply["code"] == 1
    last = reply["stderr"].splitlines()[-1]
    assert last.startswith("gatewright: error: step 2 of mixtral: loss ")
    # Which comes first follows from what overflows on the way: with native norms it is the last one's scale.
    assert "first seen in the gradient of layers.0." in last or "first seen in the gradient of norm." in last
    assert reply["stderr"].count("gatewright: error:") == 1
    assert "Traceback" not in reply["stderr"]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


def router_logits(trainer: Trainer) -> list[Tensor]:
    """Return what the routers compute within a training step."""
    seen: list[Tensor] = []
    routers = [m for n, m in trainer.model.named_modules() if n.endswith("router")]
    handles = [router.register_forward_hook(lambda m, x, y: seen.append(y.detach())) for router in routers]
    trainer.advance()
    for handle in handles:
        handle.remove()
    return seen


def test_bf16_trains_with_routers_in_fp32():
    exact, selective = fixed_trainer(30), fixed_trainer(30, precision="bf16")
    bf16_router = fixed_trainer(30, precision="bf16", router_dtype="bf16")
    outputs: list[torch.dtype] = []
    hook = selective.model.layers[0].attention.register_forward_hook(lambda m, x, y: outputs.append(y.dtype))
    assert {logits.dtype for logits in router_logits(selective)} == {torch.float32}
    hook.remove()
    assert outputs == [torch.bfloat16]
    assert {logits.dtype for logits in router_logits(bf16_router)} == {torch.bfloat16}
    assert {logits.dtype for logits in router_logits(exact)} == {torch.float32}
    ends = [advance(trainer, 25)[-1] for trainer in (exact, selective, bf16_router)]
    assert all(end < 4.5 for end in ends)
    assert abs(ends[1] - ends[0]) < 0.2
    assert len(set(ends)) == 3
    for trainer in (selective, bf16_router):
        held = [*trainer.model.parameters(), *(v["exp_avg"] for v in trainer.optimizer.state.values())]
        assert {tensor.dtype for tensor in held} == {torch.float32}


def test_two_runs_in_one_process_give_the_same_bits():
    digests = set()
    for _ in range(2):
        trainer = fixed_trainer(12)
        torch.rand(7)
        advance(trainer, 12)
        trainer.evaluate()
        digests.add(digest(trainer.checkpoint()))
    assert len(digests) == 1


def test_the_seed_draws_the_weights_and_the_data_seed_the_order():
    base, other = fixed_trainer(), fixed_trainer(seed=1)
    assert not torch.equal(base.model.head.weight, other.model.head.weight)
    assert (base.stream.batch(0) == other.stream.batch(0)).all()
    shuffled = fixed_trainer(data_seed=1)
    assert torch.equal(base.model.head.weight, shuffled.model.head.weight)
    assert (base.stream.batch(0) != shuffled.stream.batch(0)).any()


def golden_trainers() -> dict[str, Trainer]:
    """The models whose losses are recorded: each paper's rules, a dense one, and one in bf16."""
    small = {k: v for k, v in TINY.items() if k != "num_kv_heads"}
    own = {k: v for k, v in small.items() if k != "num_selected"}
    return {
        "mixtral": fixed_trainer(model=mixtral.Settings(**TINY)),
        "olmoe": fixed_trainer(paper="olmoe", model=olmoe.Settings(**small)),
        "switch, capacity 1": fixed_trainer(
            paper="switch",
            model=switch.Settings(**own, moe_layers="all", capacity_factor=1.0, init_scale=1.0),
        ),
        "dense, cosine, accumulated": fixed_trainer(
            model=mixtral.Settings(**TINY, moe_layers="none"), schedule="cosine", accumulation=2, clip=0.5
        ),
    }


@pytest.mark.parametrize("name", list(json.loads(GOLDEN.read_text())))
def test_twenty_steps_lose_as_recorded(name: str):
    recorded = json.loads(GOLDEN.read_text())[name]
    trainer = golden_trainers()[name]
    assert advance(trainer, 20) == pytest.approx(recorded["losses"], rel=1e-4)
    assert trainer.evaluate().bits_per_byte == pytest.approx(recorded["bits_per_byte"], rel=1e-4)
    assert recorded["losses"][-1] < recorded["losses"][0] - 0.9


def test_no_golden_curve_is_forgotten():
    assert set(golden_trainers()) == set(json.loads(GOLDEN.read_text()))
