"""Stop strings: cut before the first that completes, never sent in part, however the text arrives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.text.stop import StopMatcher

# Few letters, so that stop strings begin, overlap and repeat often.
LETTERS = "ab\n😀"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)
PIECES = st.lists(st.text(LETTERS, max_size=6), max_size=12)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    """What each push gave, then what flush gave, and the stop string that matched."""
    matcher = StopMatcher(stops)
    sent = [matcher.push(piece) for piece in pieces]
    return [*sent, matcher.flush()], matcher.matched


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """The definition, letter by letter: the string that completes first wins, of two at one letter the longer."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops=STOPS, pieces=PIECES)
@settings(deadline=None, max_examples=1000)
def test_outcome_is_the_definition_however_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    sent, matched = run(stops, pieces)
    assert ("".join(sent), matched) == expected(stops, "".join(pieces))


@given(stops=STOPS, pieces=PIECES)
@settings(deadline=None, max_examples=500)
def test_no_more_is_held_back_than_could_begin_a_stop_string(stops: list[str], pieces: list[str]) -> None:
    matcher, sent, seen = StopMatcher(stops), "", ""
    for piece in pieces:
        sent, seen = sent + matcher.push(piece), seen + piece
        if matcher.matched is not None:
            break
        held = seen[len(sent) :]
        assert seen == sent + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@given(stops=STOPS, pieces=PIECES)
@settings(deadline=None, max_examples=500)
def test_what_is_sent_never_ends_in_a_part_of_a_stop_string_that_completes(stops: list[str], pieces: list[str]) -> None:
    final, _ = expected(stops, "".join(pieces))
    matcher, sent = StopMatcher(stops), ""
    for piece in pieces:
        sent += matcher.push(piece)
        assert final.startswith(sent)


def test_stop_string_split_over_tokens_is_not_sent() -> None:
    assert run(["\nUser:"], ["Hi", "\n", "Us", "er", ": no"]) == (["Hi", "", "", "", "", ""], "\nUser:")


def test_text_held_back_comes_when_it_turns_out_to_be_no_stop_string() -> None:
    assert run(["\nUser:"], ["Hi\n", "Us", "eful"])[0] == ["Hi", "", "\nUseful", ""]


def test_flush_sends_everything_held_back() -> None:
    assert run(["END"], ["to be EN"]) == (["to be ", "EN"], None)


def test_flush_sends_nothing_twice() -> None:
    matcher = StopMatcher(["END"])
    matcher.push("EN")
    assert (matcher.flush(), matcher.flush()) == ("EN", "")


def test_only_the_text_before_the_match_is_sent() -> None:
    assert run(["stop"], ["go on stop and more"]) == (["go on ", ""], "stop")


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["x"])
    assert [matcher.push("ax"), matcher.push("bcd"), matcher.push("x"), matcher.flush()] == ["a", "", "", ""]
    assert matcher.matched == "x"


def test_a_match_at_the_very_beginning_leaves_nothing() -> None:
    assert run(["a"], ["abc"]) == (["", ""], "a")


def test_without_stop_strings_text_passes_at_once() -> None:
    assert run([], ["a", "", "b"]) == (["a", "", "b", ""], None)


@pytest.mark.parametrize(
    ("stops", "text", "before", "matched"),
    [
        (["abcd", "bc"], "abcd", "a", "bc"),  # the one that completes first, though the other began first
        (["bc", "abc"], "xabc", "x", "abc"),  # both complete at the same letter: the longer
        (["aab"], "aaab", "a", "aab"),  # the first try fails inside the string and restarts there
        (["abab", "ba"], "abab", "a", "ba"),
        (["a", "a"], "ba", "b", "a"),
        (["\n\n"], "one\n\n\ntwo", "one", "\n\n"),
    ],
)
def test_overlapping_stop_strings(stops: list[str], text: str, before: str, matched: str) -> None:
    for pieces in ([text], list(text)):
        sent, found = run(stops, pieces)
        assert ("".join(sent), found) == (before, matched)


def test_the_longest_stop_string_allowed_matches_letter_by_letter() -> None:
    stop = "a" * 255 + "b"
    sent, matched = run([stop], [*("a" * 300), "b", "tail"])
    assert ("".join(sent), matched) == ("a" * 45, stop)
