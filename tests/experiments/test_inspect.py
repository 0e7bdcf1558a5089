"""`gatewright inspect` on a checkpoint of transformers: result, trace and page agree with the model."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.cli import main
from gatewright.data import train_bpe
from gatewright.errors import UserError
from gatewright.experiments import inspect_model as module
from gatewright.experiments.inspect_model import InspectResult, inspect_model
from gatewright.experiments.inspect_open import InspectRun

transformers = pytest.importorskip("transformers", exc_type=ImportError)

VERSE = "the light of the land and the water of the day was good "
SUMS = "1 + 2 = 3; 4 + 5 = 9; 12 + 30 = 42; 7 + 7 = 14; "
E, K, CONTEXT = 6, 2, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as save_pretrained writes it, whose tokenizer puts an id before each text."""
    folder = tmp_path_factory.mktemp("home") / "tiny-mixtral"
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=E, num_experts_per_tok=K, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
        model.model.layers[1].mlp.gate.weight[0] = 0  # never the best of six
    model.save_pretrained(folder)
    train_bpe([VERSE, SUMS], 290).save(folder / "tokenizer.json")
    settings = json.loads((folder / "tokenizer.json").read_text())
    end = settings["added_tokens"][0]
    special = {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": end["content"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end["content"]: special},
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[str, str]:
    """Two text files."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "verse.txt").write_text(VERSE * 4)
    (folder / "sums.txt").write_text(SUMS * 3)
    return str(folder / "verse.txt"), str(folder / "sums.txt")


@pytest.fixture(scope="module")
def inspected(checkpoint: Path, texts: tuple[str, str]) -> InspectResult:
    """The result of one inspection, its page left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_report", lambda record, out: out / "report.html")
        return inspect_model(
            checkpoint, InspectRun(text=texts, out=str(checkpoint.parent / "out"), context=99)
        )


def lines(result: InspectResult) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a trace's header and its tokens."""
    head, *rest = (result.out / "trace.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(head), [json.loads(line) for line in rest]


def test_the_trace_is_what_the_model_chooses(inspected: InspectResult, checkpoint: Path):
    head, tokens = lines(inspected)
    assert head["routers"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert head["num_experts"] == [E, E]
    model = transformers.MixtralForCausalLM.from_pretrained(checkpoint)
    window = [token for token in tokens if token["domain"] == "verse" and token["i"] < CONTEXT - 1]
    assert [token["i"] for token in window] == list(range(CONTEXT - 1))
    before = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"][0]["id"]
    ids = torch.tensor([[before, *(token["id"] for token in window)]])
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    for layer, found in enumerate(logits):
        probabilities = found.softmax(dim=-1)[1:]
        weights, experts = probabilities.topk(K, dim=-1)
        assert [token["experts"][layer] for token in window] == experts.tolist()
        expected = weights / weights.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(
            torch.tensor([token["weights"][layer] for token in window]), expected, atol=6e-5, rtol=0
        )
    assert "".join(token["text"] for token in window) == VERSE[: sum(len(token["text"]) for token in window)]


def test_the_result_is_the_sum_of_its_trace(inspected: InspectResult):
    _, tokens = lines(inspected)
    side = json.loads((inspected.out / "inspect.json").read_text())["runs"][0]["sides"][0]
    assert side["inspected"]["tokens"] == len(tokens)
    domains = side["specialisation"]["domains"]
    assert domains == ["verse", "sums"]
    for layer, name in enumerate(side["routers"]):
        chosen = [(token["domain"], token["experts"][layer]) for token in tokens]
        counts = [sum(pair.count(expert) for _, pair in chosen) for expert in range(E)]
        assert side["inspected"]["counts"][name] == counts
        for row, domain in enumerate(domains):
            own = [pair for of, pair in chosen if of == domain]
            shares = [sum(expert in pair for pair in own) / len(own) for expert in range(E)]
            assert side["specialisation"]["routers"][name][row] == pytest.approx(shares, abs=1e-6)
        together = np.zeros((E, E))
        for _, (one, other) in chosen:
            together[one, other] += 1
            together[other, one] += 1
        expected = together / np.maximum(counts, 1)[:, None]
        np.testing.assert_allclose(side["inspected"]["coactivation"][name], expected, atol=6e-5)
    told = inspected.to_dict()["routers"][1]
    dead = [expert for expert in range(E) if side["inspected"]["counts"]["model.layers.1.mlp"][expert] == 0]
    assert told["dead_experts"] == dead
    assert side["token_view"][0]["pieces"][:3] == [token["text"] for token in tokens[:3]]


def test_the_command_prints_and_writes(
    checkpoint: Path, texts: tuple[str, str], tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("gatewright.training.allocator.keep_big_blocks", lambda: True)
    monkeypatch.setattr("gatewright.inspection.plots.theme.DOTS", 30)
    argv = ["inspect", str(checkpoint), "--text", *texts, "--out", str(tmp_path / "out"), "--tokens", "60"]
    assert main([*argv, "--no-trace"]) == 0
    out, err = capsys.readouterr()
    assert "tiny-mixtral (MixtralForCausalLM)" in out
    assert "model.layers.1.mlp" in out
    assert "drawing the page" in err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.html", "inspect.json", "load_map_6.png"} <= written
    assert "trace.jsonl" not in written
    assert "Where each token went" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_data_is_read_as_for_training(checkpoint: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "write_report", lambda record, out: out / "report.html")
    draw = random.Random(0)
    for name, text in (("verse", VERSE), ("sums", SUMS)):
        (tmp_path / name).mkdir()
        for number in range(20):
            words = " ".join(draw.choices(text.split(), k=300))
            (tmp_path / name / f"{number}.txt").write_text(words)
    data = (str(tmp_path / "verse"), str(tmp_path / "sums"))
    found = inspect_model(
        checkpoint, InspectRun(data=data, out=str(tmp_path / "out"), tokens=90, trace=False)
    )
    told = found.to_dict()
    assert told["domains"] == ["verse", "sums"]
    # Windows of fifteen tokens behind the beginning of a text.
    assert told["tokens"] == 2 * 90
    assert told["trace"] is None
    assert found.record["data"]["fingerprint"]


def refused(folder: Path, **options: Any) -> str:
    """Return the one line that says why a folder cannot be inspected."""
    with pytest.raises(UserError) as error:
        inspect_model(folder, InspectRun(**options))
    line = str(error.value)
    assert "\n" not in line
    assert "allowed" in line
    return line


def test_what_would_run_code_is_refused(checkpoint: Path, texts: tuple[str, str], tmp_path):
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "only pickled weights (pytorch_model.bin), which can run code" in refused(pickled, text=texts)
    coded = shutil.copytree(checkpoint, tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (coded / "config.json").write_text(json.dumps(config))
    assert "brings code of its own (auto_map in config.json)" in refused(coded, text=texts)


def test_a_checkpoint_that_lacks_a_router_is_refused(checkpoint: Path, texts: tuple[str, str], tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    (gone,) = [name for name in weights if name.endswith("layers.1.block_sparse_moe.gate.weight")]
    save_file(
        {name: w for name, w in weights.items() if name != gone},
        broken / "model.safetensors",
        {"format": "pt"},
    )
    line = refused(broken, text=texts)
    assert "lacks 1 weights of MixtralForCausalLM (model.layers.1.mlp.gate.weight, ...)" in line


def test_other_mistakes_are_one_line(checkpoint: Path, texts: tuple[str, str], tmp_path):
    assert "is no folder" in refused(tmp_path / "nowhere", text=texts)
    assert "holds neither run.toml nor config.json" in refused(tmp_path, text=texts)
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused(bare, text=texts)
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    assert "is not UTF-8 text" in refused(checkpoint, text=(str(tmp_path / "latin.txt"),))
    assert "cannot be read (No such file" in refused(checkpoint, text=(str(tmp_path / "none.txt"),))
    (tmp_path / "empty.txt").write_text("")
    assert "text empty holds no token" in refused(checkpoint, text=(str(tmp_path / "empty.txt"),))
    with pytest.raises(UserError, match="--text and --data; allowed: one of them"):
        InspectRun(text=texts, data=texts)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.html").write_text("a training run's")
    assert "holds another report" in refused(checkpoint, text=texts, out=str(tmp_path / "other"))
    wide = shutil.copytree(checkpoint, tmp_path / "wide")
    train_bpe([VERSE * 50, SUMS * 50, "".join(map(chr, range(33, 900)))], 600).save(wide / "tokenizer.json")
    strange = tmp_path / "strange.txt"
    strange.write_text("".join(map(chr, range(33, 900))))
    assert "but the model has 300 embeddings" in refused(wide, text=(str(strange),))
