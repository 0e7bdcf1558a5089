"""One pass over texts: counts by hand, windows, what stands before them, and the page that shows it all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.inspection import Window, render_page, survey, write_report
from gatewright.inspection.inspected import router_lines, summary_text
from gatewright.inspection.plots.atlas import MOST_MATRICES, loads_by_size
from gatewright.inspection.survey import strongest_pairs
from tests.inspection.page import check, plain


class Sorter(nn.Module):
    """Sends id i to experts i mod 4 and (i + 1) mod 4 of five: the last gets nothing."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = layers
        self.own = nn.Parameter(torch.zeros(1))
        self.given: list[list[int]] = []

    def forward(self, tokens: Tensor, capture: bool = False) -> Any:
        assert capture
        self.given += tokens.tolist()
        ids = tokens.reshape(-1)
        record = SimpleNamespace(
            num_experts=5,
            experts=torch.stack([ids % 4, (ids + 1) % 4], dim=1),
            combine_weights=torch.tensor([[0.75, 0.25]]).expand(len(ids), 2),
            scores=torch.full((len(ids), 5), 0.2),
        )
        return SimpleNamespace(stats={f"layers.{layer}.router": record for layer in range(self.layers)})


class Letters:
    """A tokenizer of one letter per id."""

    eot = 99

    def pieces(self, ids: Any) -> list[str]:
        return [chr(97 + int(i) % 26) for i in ids]


def surveyed(model: nn.Module, texts: dict[str, list[int]], **more: Any) -> dict[str, Any]:
    """Return the survey of short texts in windows of three."""
    return survey(model, {k: np.array(v) for k, v in texts.items()}, Letters(), context=3, **more)


def test_by_hand():
    # ids 0 0 1 and 2: choices (0 1) (0 1) (1 2) and (2 3).
    found = surveyed(Sorter(), {"one": [0, 0, 1], "two": [2]})
    inspected, name = found["inspected"], "layers.0.router"
    assert (inspected["tokens"], inspected["domain_tokens"]) == (4, {"one": 3, "two": 1})
    assert inspected["counts"][name] == [2, 3, 2, 1, 0]
    assert found["specialisation"]["routers"][name] == [
        pytest.approx([2 / 3, 1, 1 / 3, 0, 0], abs=1e-6),
        [0, 0, 1, 1, 0],
    ]
    assert found["specialisation"]["chances"] == {name: 2 / 5}
    # Of the three tokens of expert 1, two select 0 and one 2; both of expert 0 select 1.
    assert inspected["coactivation"][name][1] == pytest.approx([0.6667, 0, 0.3333, 0, 0])
    assert inspected["coactivation"][name][0] == [0, 1, 0, 0, 0]
    assert inspected["pairs"][name] == []  # of so few tokens
    assert found["token_view"][0] == {
        "domain": "one",
        "pieces": ["a", "a", "b"],
        "routers": {name: {"experts": [[0, 1], [0, 1], [1, 2]], "weights": [[0.75, 0.25]] * 3}},
    }
    side = {"inspected": inspected, "specialisation": found["specialisation"]}
    (line,) = router_lines(side)
    assert (line.experts, line.selected, line.dead) == (5, 2, (4,))
    assert line.largest == pytest.approx(3 / (8 / 5))
    shares = np.array([2, 3, 2, 1]) / 8
    assert line.entropy == pytest.approx(-(shares * np.log(shares)).sum() / np.log(5))
    assert line.special == pytest.approx(1 / (2 / 5))
    assert "1: 4" in summary_text(side)


def test_windows_are_spread_and_the_first_ids_are_shown_though_not_counted():
    model = Sorter()
    seen: list[Window] = []
    found = surveyed(
        model, {"long": list(range(30))}, most_tokens=6, shown=7, batch_size=2, on_window=seen.append
    )
    # Two windows of three, the first and the last of ten; two more are read to show the first seven tokens.
    assert [window.start for window in seen] == [0, 27]
    assert [window.ids.tolist() for window in seen] == [[0, 1, 2], [27, 28, 29]]
    assert found["inspected"]["tokens"] == 6
    assert model.given == [[0, 1, 2], [27, 28, 29], [3, 4, 5], [6, 7, 8]]
    assert found["token_view"][0]["pieces"] == list("abcdefg")


def test_what_stands_before_a_window_enters_nothing():
    model = Sorter()
    found = surveyed(model, {"one": [1, 1, 1, 1]}, start=[3])
    assert model.given == [[3, 1, 1], [3, 1, 1]]
    assert found["inspected"]["counts"]["layers.0.router"] == [0, 4, 4, 0, 0]
    assert found["token_view"][0]["pieces"] == ["b"] * 4


def test_a_text_without_a_token_and_a_context_without_room_are_refused():
    with pytest.raises(UserError, match="domain two holds no token"):
        surveyed(Sorter(), {"one": [1], "two": []})
    with pytest.raises(UserError, match="context 3; allowed: 5 or more"):
        surveyed(Sorter(), {"one": [1]}, start=[1, 2, 3, 4])


def test_pairs_are_named_where_experts_have_ten_tokens():
    found = surveyed(Sorter(), {"one": [0] * 12 + [1] * 3 + [3] * 9})
    # Expert 1 has fifteen tokens, 0 twenty-one, and 2 three: nine of those of 0 are with 3, twelve with 1.
    assert found["inspected"]["pairs"]["layers.0.router"] == [
        [1, 0, 0.8],
        [0, 1, 0.5714],
        [0, 3, 0.4286],
        [1, 2, 0.2],
    ]
    assert strongest_pairs(np.zeros((3, 3))) == []
    assert strongest_pairs(np.array([[20, 10], [10, 40]]), 1) == [[0, 1, 0.5]]


def result(layers: int = 2) -> dict[str, Any]:
    """Return what an inspection records."""
    texts = {"verse": [0, 1, 2, 3] * 6, "sums <b>": [1, 1, 2, 1] * 6}
    found = surveyed(Sorter(layers), texts)
    side = {"name": "m", "kind": "sparse", "label": "m (Sorter)", "settings": {"a": 1}, "total_parameters": 5}
    return {
        "schema": "gatewright.inspect.v1",
        "title": "m: where tokens go",
        "command": "gatewright inspect m",
        "created": "2026-01-02T03:04:05+00:00",
        "environment": {"gatewright": "0.1.0"},
        "data": {"name": "verse, sums", "domains": list(texts)},
        "runs": [{"seed": 0, "sides": [{**side, **found}]}],
    }


@pytest.mark.usefixtures("coarse")
def test_the_page_says_what_was_seen(tmp_path):
    page = write_report(result(), tmp_path)
    html = page.read_text(encoding="utf-8")
    found, words = check(html), plain(html)
    assert {"verdict", "load", "specialisation", "pairs", "text", "tokens", "made"} <= set(found.identities)
    assert len(found.identities) == len(set(found.identities))
    assert "2 of 10 experts were selected by no token" in words
    assert "2 sparse layers over 48 tokens of 2 domains" in words
    assert "sums <b>" in words
    assert "Summary" in words
    assert "Verdict" not in words
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {
        "load_map_5", "specialisation_layers.0.router", "specialisation_layers.1.router",
        "pairs_layers.0.router", "pairs_layers.1.router",
    }  # fmt: skip
    for reference in found.references:
        assert reference.startswith(("data:image/png;base64,", "#"))


@pytest.mark.usefixtures("undrawn")
def test_absent_parts_are_named_and_many_layers_are_thinned():
    bare = result()
    side = bare["runs"][0]["sides"][0]
    for part in ("inspected", "specialisation", "token_view"):
        side[part] = None
    words = plain(render_page(bare)[0])
    for part in (
        "Load: not recorded",
        "Specialisation by domain: not recorded",
        "Co-activation: not recorded",
    ):
        assert part in words
    assert "No router is recorded" in words
    many = result(MOST_MATRICES + 3)
    assert f"Figures of {MOST_MATRICES} layers, spread evenly" in plain(render_page(many)[0])
    ((names, loads),) = loads_by_size(many["runs"][0]["sides"][0]).values()
    assert (len(names), loads.shape) == (MOST_MATRICES + 3, (MOST_MATRICES + 3, 5))
