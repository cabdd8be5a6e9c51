"""`StopText` against a search of the whole text: pieces must not matter."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apt_jax.tokenization.stop_text import StopText

LETTERS = "ab\u00e9"  # few letters, so that stops overlap each other and themselves


def whole_search(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop string that is complete first ends the text; of those complete at once, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def feed(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    """As the engine does: nothing is pushed after a stop, and without one the rest is flushed."""
    stop_text = StopText(stops, include)
    shown = ""
    for piece in pieces:
        new, stop = stop_text.push(piece)
        shown += new
        if stop is not None:
            assert stop_text.flush() == "", "text behind the stop came out"
            return shown, stop
    return shown + stop_text.flush(), None


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


texts = st.text(LETTERS, max_size=24)
stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)
places = st.lists(st.integers(0, 24), max_size=8)


@given(texts, stop_lists, places, st.booleans())
@example("abcd", ["abcd", "bc"], [3], False)
@example("abcd", ["abcd", "bc"], [], False)
@example("aab", ["aab", "ab"], [1, 2], False)
def test_any_split_shows_what_a_search_of_the_whole_text_shows(text, stops, places, include):
    assert feed(cut(text, places), stops, include) == whole_search(text, stops, include)


@given(texts, stop_lists, places)
def test_held_back_is_exactly_the_longest_end_that_may_begin_a_stop(text, stops, places):
    stop_text = StopText(stops, include_stop=False)
    seen = shown = ""
    for piece in cut(text, places):
        new, stop = stop_text.push(piece)
        if stop is not None:
            return
        seen, shown = seen + piece, shown + new
        begins = [n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) for s in stops)]
        assert shown == seen[: len(seen) - max(begins, default=0)]


@pytest.mark.parametrize(("include", "shown"), [(False, "one "), (True, "one STOP")])
def test_a_stop_over_three_pieces(include, shown):
    stop_text = StopText(["STOP"], include)
    assert stop_text.push("one ST") == ("one ", None)
    assert stop_text.push("O") == ("", None)
    new, stop = stop_text.push("P two")
    assert ("one " + new, stop) == (shown, "STOP")


def test_a_false_alarm_comes_out_with_the_next_piece_and_at_the_end():
    stop_text = StopText(["STOP"], False)
    assert stop_text.push("ST") == ("", None)
    assert stop_text.push("ART S") == ("START ", None)
    assert stop_text.flush() == "S"
    assert stop_text.flush() == ""


def test_without_stops_all_text_passes_at_once():
    stop_text = StopText([], False)
    assert stop_text.push("anything") == ("anything", None)
    assert stop_text.flush() == ""
