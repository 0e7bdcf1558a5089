"""The routing of generated tokens is that of the same tokens in the whole text; a dense model has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gatewright.data import ByteTokenizer
from gatewright.errors import UserError
from gatewright.generation import Reader, Sampling, generate
from gatewright.generation.opened import TextModel
from gatewright.generation.routing import NOTHING, Choice, route_line, routing_data
from gatewright.generation.writing import Writer, Writing, continue_text
from gatewright.inspection.capture import capture_routing
from tests.test_generation import PROMPT, build


def written(model: Any, count: int, ends: frozenset[int] = frozenset()) -> Writer:
    reader = Reader(model, 1, 128, capture=True)
    options = {"count": count, "sampling": Sampling(seed=1), "ends": ends}
    one = Writer(reader, torch.tensor([PROMPT]), ByteTokenizer(), **options)
    for _ in one:
        pass
    return one


@pytest.mark.parametrize("paper", ["mixtral", "switch", "sparsely_gated"])
@pytest.mark.parametrize("ended", [False, True])
def test_each_token_has_the_experts_that_read_it(paper: str, ended: bool):
    model = small(paper)
    free = generate(model, PROMPT, max_new_tokens=12, seed=1)
    last = max(set(free), key=free.index)
    one = written(model, 12, frozenset({last}) if ended else frozenset())
    ids = free[: free.index(last)] if ended else free
    assert [token for token, _ in one.routed] == one.ids == ids
    # The whole text at once: where a token stands, its own experts are.
    for layer in model.modules():
        if hasattr(layer, "capacity"):
            layer.capacity = None
    whole = capture_routing(model, [[*PROMPT, *ids]])
    for place, (_, route) in enumerate(one.routed, len(PROMPT)):
        assert list(route) == list(whole)
        for name, choice in route.items():
            assert choice.experts == whole[name].experts[place].tolist()
            assert choice.weights == pytest.approx(whole[name].weights[place].tolist(), abs=1e-5)
    assert len({str(route[name].experts) for _, route in one.routed for name in route}) > 1


def small(paper: str) -> Any:
    if paper == "sparsely_gated":
        from gatewright.papers import get_paper

        torch.manual_seed(2)
        file = get_paper(paper)
        model = file.build(file.Settings()).eval()
        # Its gates begin at 0, where all experts are equal.
        for router in model.routers().values():
            nn.init.normal_(router.weight)
        return model
    return build(paper)


def test_a_line_by_hand():
    route = {"a": Choice([3, 7], [0.614, 0.386]), "b": Choice([0, -1], [1.0, 0.0]), "c": Choice([-1], [0.0])}
    assert route_line("the", route) == "'the'            3:0.61+7:0.39 | 0:1.00 | none"


def test_the_data_has_the_form_of_a_trace():
    model = build()
    one = written(model, 3)
    found = routing_data(one.routed, ByteTokenizer().pieces(one.ids), model)
    assert found is not None
    assert found["routers"] == list(model.routers())
    assert [token["id"] for token in found["tokens"]] == one.ids
    first = found["tokens"][0]
    assert first["experts"] == [choice.experts for choice in one.routed[0][1].values()]
    assert [len(weights) for weights in first["weights"]] == [4] * len(found["routers"])
    assert sum(first["weights"][0]) == pytest.approx(1, abs=2e-4)


def opened(model: Any) -> TextModel:
    return TextModel(model, ByteTokenizer(), (256,), frozenset({256}))


def test_lines_come_first_and_then_the_text_whole():
    shown: list[str] = []
    told: list[str] = []
    model, greedy = opened(build()), Sampling(temperature=0)
    more = {"show": shown.append, "tell": told.append}
    data = continue_text(model, "ab", greedy, Writing(5, show_routing=True), **more)
    assert [text for text in shown if text] == ["ab" + data["text"]]
    assert len(told) == data["new_tokens"] == len(data["routing"]["tokens"]) == 5
    assert told[0] == route_line(data["routing"]["tokens"][0]["text"], written_route(data, 0))
    plain = continue_text(model, "ab", greedy, Writing(5))
    assert (plain["text"], plain["routing"]) == (data["text"], None)


def written_route(data: dict[str, Any], place: int) -> dict[str, Choice]:
    token = data["routing"]["tokens"][place]
    layers = zip(data["routing"]["routers"], token["experts"], token["weights"], strict=True)
    return {name: Choice(experts, weights) for name, experts, weights in layers}


def test_a_dense_model_has_nothing_to_show_and_says_so():
    told: list[str] = []
    shown: list[str] = []
    model = opened(build(moe_layers="none", width=48))
    more = {"show": shown.append, "tell": told.append}
    data = continue_text(model, "ab", Sampling(temperature=0), Writing(3, show_routing=True), **more)
    assert told == [NOTHING]
    assert data["routing"] is None
    assert "".join(shown) == "ab" + data["text"]


def test_a_guess_is_not_shown():
    with pytest.raises(UserError, match="ahead with the routing shown"):
        Reader(build(), 1, 8, ahead=True, capture=True)
