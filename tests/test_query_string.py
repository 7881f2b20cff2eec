"""Arguments in a query string: what they decode to, what their texts mean, what is refused."""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.errors import InvalidRequest
from predictor.protocols.query_string import arguments, typed


def test_names_and_values_are_percent_decoded() -> None:
    assert arguments(b"a=1&b=x%20y+z&c=&d&%C3%A9=%E2%82%AC") == {"a": "1", "b": "x y z", "c": "", "d": "", "é": "€"}
    assert arguments(b"") == {}


@pytest.mark.parametrize(
    ("query", "said"),
    [(b"a=1&a=1", '"a" twice'), (b"a=%ff", "UTF-8"), (b"%ff=1", "UTF-8"), (b"a=\xe9", "UTF-8"), (b"a=1&" * 101, "100")],
)
def test_what_is_ambiguous_or_no_text_is_refused(query: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        arguments(query)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"))))
def test_whatever_a_client_encodes_comes_back(fields: dict[str, str]) -> None:
    assert arguments(urlencode(fields).encode()) == fields


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("-5", -5), ("+5", 5), ("007", 7), (str(2**64), 2**64), ("0.7", 0.7), (".5", 0.5), ("1.", 1.0),
        ("1e3", 1000.0), ("-2.5E-1", -0.25), ("true", True), ("True", True), ("FALSE", False), ("[1]", [1]),
        ('{"5": 1}', {"5": 1}),
    ],
)  # fmt: skip
def test_a_text_is_what_it_says(text: str, value: Any) -> None:
    read = typed({"x": text}, ())["x"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    ["", " 5", "5 ", "1_000", "nan", "inf", "-Infinity", "1e999", "0x10", "٣", "1,5", "null", "yes", "--5", "e5", ".",
     "9" * 5_000],
)  # fmt: skip
def test_other_texts_stay_texts_for_a_field_to_refuse(text: str) -> None:
    assert typed({"x": text}, ()) == {"x": text}


def test_texts_stay_texts_where_a_field_is_one_and_values_stay_values() -> None:
    assert typed({"prompt": "5", "n": "5", "m": [5], "k": None}, ("prompt",)) == {
        "prompt": "5",
        "n": 5,
        "m": [5],
        "k": None,
    }


@pytest.mark.parametrize("text", ["{", "[1", '{"a": 1, "a": 2}', "[NaN]", "[" * 50_000, '["\\ud800"]', "[1e999]"])
def test_broken_json_is_refused_by_the_fields_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias is not valid JSON") as caught:
        typed({"logit_bias": text}, ())
    assert caught.value.param == "logit_bias"
    assert len(str(caught.value)) < 150


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_numbers_come_back_as_written(number: float) -> None:
    read = typed({"x": json.dumps(number)}, ())["x"]
    assert read == number
    assert math.isfinite(read)
