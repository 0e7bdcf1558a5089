"""Stop texts: found however tokens cut them; the text ends exactly before, and nothing of one is shown."""

from __future__ import annotations

import random

import pytest

from gatewright.errors import UserError
from gatewright.generation import StopTexts
from tests.generation.writers import writer


def pushed(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    """Return what comes of each piece and of the end, and which stop text was found."""
    stop = StopTexts(stops)
    out = [stop.push(piece) for piece in pieces]
    return [*out, stop.flush()], stop.found


def test_what_may_be_a_stop_text_waits_by_hand():
    # "E" may begin END, "EN" as well; the first E of "EE" cannot.
    assert pushed(["END"], ["ab", "E", "N", "D", "c"]) == (["ab", "", "", "", "", ""], "END")
    assert pushed(["END"], ["abEE", "NDx"]) == (["abE", "", ""], "END")
    assert pushed(["END"], ["E", "NO", "E"]) == (["", "ENO", "", "E"], None)
    # Several: the one that is complete first, of those that end together the longest.
    assert pushed(["bcd", "c"], ["abcd"]) == (["ab", ""], "c")
    assert pushed(["c", "abc"], ["xab", "c"]) == (["x", "", ""], "abc")
    assert pushed(["aab"], ["aaab"]) == (["a", ""], "aab")
    assert pushed([], ["a", "b"]) == (["a", "b", ""], None)


def by_search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return the text before the first stop text: the shortest beginning that ends with one is looked for."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_borders_of_pieces_change_nothing():
    draw = random.Random(3)
    stopped = 0
    for _ in range(600):
        text = "".join(draw.choices("ab€", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("ab€", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        cuts = sorted(draw.randint(0, len(text)) for _ in range(4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out, found = pushed(stops, pieces)
        assert ("".join(out), found) == by_search(text, stops), (text, stops, pieces)
        stopped += found is not None
    assert 100 < stopped < 500


def test_a_text_ends_before_its_stop_text_and_is_told_so():
    # A byte is a token here: E and N wait, and D ends it.
    one = writer("abcENDxyz", stop=["END"])
    shown = [*one]
    assert shown == ["a", "b", "c", "", "", ""]
    assert (one.text, one.end, len(one.ids)) == ("abc", "stop", 6)
    # The end of text and the count end it too, and then what waited is shown.
    assert [*writer("abEN", stop=["END"])] == ["a", "b", "", "", "EN"]
    assert writer_end("abEN") == ("abEN", "end")
    assert writer_end("abEN", count=3) == ("abE", "length")


def writer_end(text: str, count: int = 100) -> tuple[str, str | None]:
    one = writer(text, stop=["END"], count=count)
    for _ in one:
        pass
    return one.text, one.end


def test_a_stop_text_of_many_bytes_and_an_open_character():
    # The euro sign is three tokens here; two of its bytes are no stop text, and what stays open is U+FFFD.
    one = writer("a€b", stop=["€"])
    assert ("".join(one), one.end, len(one.ids)) == ("a", "stop", 4)
    open_one = writer(b"a\xe2\x82", stop=["€"])
    assert ("".join(open_one), open_one.end) == ("a\ufffd", "end")
    late = writer(b"a\xe2\x82", stop=["\ufffd"])
    assert ("".join(late), late.end) == ("a", "stop")


def test_an_empty_stop_text_is_refused():
    with pytest.raises(UserError, match="an empty stop text"):
        StopTexts(["a", ""])
