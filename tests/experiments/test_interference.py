"""Interference: what is continued, what is measured, which rows a joined batch holds, and the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.data import Corpus, TokenStream, open_corpus
from gatewright.experiments.descent import descend
from gatewright.experiments.interference import Interference, quick_form, run_interference, verdict
from gatewright.experiments.interference_text import ARMS, Joined, TextPlan, cost, domain_tokens, setback
from gatewright.experiments.interference_vowels import (
    PAIRS,
    SYSTEMS,
    VowelPlan,
    continued,
    costs,
    error_on,
    run_vowels,
    setbacks,
)
from gatewright.experiments.lab import Plan, build
from gatewright.experiments.vowel_runs import READINGS, TRAIN, peterson_barney
from gatewright.papers import get_paper
from gatewright.training.seeded import drawn

PAPER = get_paper("local_experts")


def test_a_continued_run_goes_on_where_it_was():
    settings = READINGS["A"].settings("local-experts-4", 0.1)
    cases = READINGS["A"].cases(peterson_barney().of_speakers(TRAIN))
    objective = PAPER.objective(settings)

    def run(models: list[torch.nn.Module], updates: int):
        return descend(models, objective, cases, [0.05, 0.02], limit=updates, reached=0.0)

    models = [drawn(lambda: PAPER.build(settings), seed) for seed in (0, 1)]
    whole = run(models, 30)
    halves = run(continued(models[0], run(models, 12)), 18)
    for name, own in whole.weights.items():
        assert torch.equal(own, halves.weights[name]), name
    error = error_on(whole.model, whole.weights, cases)
    torch.testing.assert_close(error, whole.squared_error)


def test_the_first_pair_is_measured_from_the_switch_on(tmp_path: Path):
    plan = VowelPlan(seeds=2, rates=(0.05,), alone=40, both=30)
    record = run_vowels(plan, tmp_path)
    assert list(record) == list(PAIRS)
    for systems in record.values():
        assert list(systems) == list(SYSTEMS)
        for own in systems.values():
            one = own["0.05"]
            assert one["path"][0] == pytest.approx(sum(one["switch"]) / 2, abs=1e-6)
            assert len(one["path"]) == 31
            assert all(most >= end for most, end in zip(one["most"], one["end"], strict=True))
    # By hand: at the switch a run is what 40 updates on its pair alone made of it.
    first = PAIRS["[i], [I] first"][0]
    vowels = peterson_barney().of_speakers(TRAIN)
    own = np.isin(vowels.vowel, first)
    x, d = (part[torch.from_numpy(own)] for part in READINGS["A"].cases(vowels))
    settings = READINGS["A"].settings("back-propagation-6", plan.init)
    alone = descend(
        [drawn(lambda: PAPER.build(settings), 1)],
        PAPER.objective(settings),
        (x, d),
        [0.05],
        limit=40,
        reached=0.0,
    )
    found = record["[i], [I] first"]["back-propagation-6"]["0.05"]["switch"][1]
    assert found == pytest.approx(float(alone.squared_error[0]), rel=1e-9)


def test_setback_and_cost_of_vowels_by_hand():
    own = {"switch": [0.1, 0.2], "most": [0.4, 0.2], "end": [0.15, 0.1], "stayed": [0.05, 0.1]}
    assert setbacks(own) == pytest.approx([0.3, 0.0])
    assert costs(own) == pytest.approx([0.1, 0.0])


def test_the_first_domains_rows_are_the_same_alone_and_joined():
    first, second = (TokenStream(np.arange(a, a + 200), 2, 4) for a in (0, 1000))
    joined, alone = Joined(first, second, 3), Joined(first, second, None)
    for step in (0, 2):
        assert np.array_equal(joined.batch(step), alone.batch(step))
    late = joined.batch(5)
    assert late.shape == (4, 5)
    assert np.array_equal(late[:2], alone.batch(5))
    assert np.array_equal(late[2:], second.batch(2))


def two_domains(folder: Path) -> Corpus:
    for name, word in (("scripture", "aaaa "), ("code", "bbbb ")):
        (folder / name).mkdir()
        for number in range(30):
            (folder / name / f"{number}.txt").write_text(word * 50 + f"{number}\n" * 3)
    return open_corpus([folder / "scripture", folder / "code"], cache=folder / "cache")


def test_a_domains_tokens_are_its_documents_and_no_others(tmp_path: Path):
    corpus = two_domains(tmp_path)
    for domain, letter, other in (("scripture", "a", "b"), ("code", "b", "a")):
        tokens = domain_tokens(corpus, domain)
        assert (tokens == ord(letter)).sum() > 1000
        assert not (tokens == ord(other)).any()
        ends = (tokens == corpus.tokenizer.vocab_size - 1).sum()
        assert len(tokens) == corpus.train_domain_bytes[domain] + ends
    sizes = sum(len(domain_tokens(corpus, d)) for d in corpus.domains)
    assert sizes == corpus.train_tokens


def test_both_decoders_cost_the_same():
    plan = Plan(ARMS, "dense")
    sparse, dense = (build(plan, arm, 257, 0) for arm in ARMS)
    router = sparse.layers[0].feed_forward.router.weight.numel()
    sparse_active = 2 * 3 * plan.width * ARMS[0].expert_width + router
    dense_active = sum(p.numel() for p in dense.layers[0].feed_forward.parameters())
    assert dense_active == pytest.approx(sparse_active, rel=0.002)


def _text_run(joined: list[float], stayed: float) -> dict[str, Any]:
    path = [[place, value] for place, value in enumerate(joined)]
    return {
        "joined": {"path": path, "switch": joined[0], "end": joined[-1]},
        "stayed": {"path": path, "end": stayed},
    }


@pytest.mark.parametrize(("dense", "net", "held"), [(2.2, 0.4, True), (2.04, 0.4, False), (2.2, 0.15, False)])
def test_the_verdict_asks_for_both_halves(dense: float, net: float, held: bool):
    run = _text_run([2.0, 2.3, 2.1], 2.0)
    assert (cost(run), setback(run)) == pytest.approx((0.1, 0.3))
    low = {"switch": [0.1], "most": [0.2], "end": [0.1], "stayed": [0.1]}
    high = {**low, "most": [net]}
    record = {
        "vowels": {"order": {size: {"0.05": high if "back" in size else low} for size in SYSTEMS}},
        "text": {"runs": {"a then b": {"sparse": [run], "dense": [_text_run([2.0, dense], 2.0)]}}},
    }
    assert verdict(record)["held"] == held


def test_a_short_run_writes_its_page_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    short = Interference(
        VowelPlan(seeds=2, rates=(0.05,), alone=5, both=5),
        TextPlan(
            orders=(("scripture", "code"),),
            seeds=(0,),
            rates=(3e-3,),
            steps=2,
            every=1,
            rows=1,
            eval_bytes=600,
        ),
    )
    corpus = two_domains(tmp_path)
    monkeypatch.setattr("gatewright.experiments.interference_text.open_corpus", lambda *_, **__: corpus)
    record, page, pictures = run_interference(tmp_path, False, short)
    assert record["verdict"]["sentence"] in page
    assert pictures["setbacks"].stat().st_size > 1000
    (run,) = record["text"]["runs"]["scripture then code"]["sparse"]
    assert [step for step, _ in run["joined"]["path"]] == [2, 3, 4]
    assert run["joined"]["path"][0] == run["stayed"]["path"][0]

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("gatewright.experiments.interference_text._train", refuse)
    assert run_interference(tmp_path, False, short)[0]["text"] == record["text"]
    assert len(quick_form(short).text.orders) == 1
