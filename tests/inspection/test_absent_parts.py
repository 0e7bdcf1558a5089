"""No absent, null or odd part of a result stops the page."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from gatewright.inspection import render_page
from tests.inspection import sample
from tests.inspection.page import check, plain


def _without(result: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(result)
    node: Any = changed
    for key in path[:-1]:
        node = node[key]
    if value is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return changed


def _paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return every path to a key of a mapping, three lists and five keys deep, first list items only."""
    if isinstance(node, dict):
        own = [(*path, key) for key in node]
        return own + [deeper for key, value in node.items() for deeper in _paths(value, (*path, key))]
    return _paths(node[0], (*path, 0)) if isinstance(node, list) and node and len(path) < 6 else []


@pytest.mark.usefixtures("undrawn")
def test_no_absent_or_null_part_stops_the_page() -> None:
    result = sample.full_race(seeds=1, experts=4, chosen=2, routers=1, length=6, points=4)
    tried = 0
    for path in _paths(result):
        if path == ("schema",) or "settings" in path:
            continue
        for value in (KeyError, [None, float("nan")][tried % 2]):
            check(render_page(_without(result, path, value))[0])
        tried += 1
    assert tried > 100


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    "change",
    [
        {"runs": []},
        {"comparisons": [], "verdict": {}},
        {"comparisons": [{"sparse": "sparse", "dense": "gone", "gap_bpb": 0.1}]},
        {"data": None, "environment": None},
    ],
)
def test_figures_are_drawn_from_what_is_left(change: dict[str, Any]) -> None:
    result = sample.race(seeds=1, routers=1, length=12, experts=6, chosen=2) | change
    check(render_page(result)[0])


@pytest.mark.usefixtures("coarse")
def test_odd_shapes_are_drawn() -> None:
    result = sample.race(seeds=1, routers=1, length=9, experts=1, chosen=1)
    side = result["runs"][0]["sides"][0]
    side["label"] = "a $dollar_ {brace} name of 60 characters that does not fit anywhere 漢字"
    side["load_over_time"] = {"steps": [0], "routers": {"a/b": [[1.0]]}}
    side["specialisation"]["chance"] = 1.0
    side["curve"] = side["curve"][:1]
    side["token_view"]["routers" if isinstance(side["token_view"], dict) else 0]["routers"]["layers.0"] = {
        "experts": [[-1]] * 9,
        "weights": [[0.0]] * 9,
    }
    html, images = render_page(result)
    assert "No token of this text reached an expert" in plain(html)
    assert "load_a-b" in {image.name for image in images}
    assert all("/" not in image.name for image in images)
