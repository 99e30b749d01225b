"""A stop ends a text where it begins, wherever pieces begin and end."""

from hypothesis import given
from hypothesis import strategies as st

from quip.serve.stops import Stops


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop_that_is_complete(text, words):
    found = [(text.index(word) + len(word), text.index(word)) for word in words if word in text]
    for size in (1, 2, 5):
        stops = Stops(words)
        pieces = [stops.feed(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join(pieces) + stops.rest() == (text[: min(found)[1]] if found else text)
        assert stops.found == bool(found)


def test_of_two_stops_the_one_that_is_complete_first_counts():
    for pieces in (["abab"], list("abab")):
        stops = Stops(["abab", "ba"])
        assert "".join(map(stops.feed, pieces)) == "a"


def test_what_cannot_begin_a_stop_is_not_held_back():
    stops = Stops(["\n\n"])
    assert stops.feed("one") == "one"
    assert stops.feed("\n") == ""
    assert stops.feed("two") == "\ntwo"
