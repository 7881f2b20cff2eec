"""JSON as RFC 8259 means it: what the standard library lets through is refused."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.errors import InvalidRequest
from predictor.protocols.strict_json import loads, printable

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**390), 10**390)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


def refusal(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        loads(body)
    assert caught.value.status == 400
    return caught.value


@given(value=JSON_VALUES, ascii_only=st.booleans())
@settings(deadline=None, max_examples=300)
def test_what_json_can_say_is_read_as_the_standard_library_reads_it(value: object, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert loads(body) == json.loads(body)


@given(body=st.one_of(st.binary(max_size=60), st.text('{}[]":,\\ud8019eE-+.ntrue', max_size=40).map(str.encode)))
@settings(deadline=None, max_examples=1000)
def test_any_bytes_are_json_or_a_clear_refusal(body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        loads(body)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"a": 1, "a": 1}', "a"),
        (b'{"a": 1, "b": 2, "c": 3, "b": 4}', "b"),
        (b'{"instances": ["x"], "parameters": {"seed": 1, "seed": 2}}', "seed"),
        (b'[[{"k": {"deep": 1, "deep": 2}}]]', "deep"),
        (b'{"a": 1, "\\u0061": 2}', "a"),
        (b'{"": 1, "": 2}', ""),
        ('{"é": 1, "é": 2}'.encode(), "é"),
    ],
)
def test_a_key_that_stands_twice_is_refused_by_name(body: bytes, key: str) -> None:
    error = refusal(body)
    assert printable(key) in str(error)
    assert "twice" in str(error)
    assert error.param == key


def test_the_same_key_in_two_objects_passes() -> None:
    assert loads(b'[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


@pytest.mark.parametrize(
    "body",
    [
        rb'"\ud800"',
        rb'["a", {"b": "x\udc00y"}]',
        rb'{"\ud83d": 1}',
        rb'{"a": {"\udfff": []}}',
        rb'"\ude00\ud83d"',  # the halves in the wrong order
        rb'"\ud83d\u0041"',
        rb'"\ud83d\ud83d\ude00"',
        rb'{"\ud800": 1, "\ud800": 2}',
        rb'"\uD800"',
    ],
)
def test_half_of_a_surrogate_pair_is_refused(body: bytes) -> None:
    error = refusal(body)
    assert "surrogate" in str(error) or "twice" in str(error)
    # Whatever the message quotes must itself be sendable.
    str(error).encode("utf-8")


def test_a_whole_surrogate_pair_passes() -> None:
    assert loads(rb'{"\ud83d\ude00": ["\ud83d\ude00", "\\ud800"]}') == {"😀": ["😀", "\\ud800"]}


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("form", ["%s", "[1, %s]", '{"parameters": {"temperature": %s}}'])
def test_numbers_that_json_lacks_are_refused_by_name(form: str, name: str) -> None:
    assert name in str(refusal((form % name).encode()))


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1e309", "123456789e999999", "1" + "0" * 399 + ".5"])
def test_a_number_past_float_is_refused(number: str) -> None:
    message = str(refusal(f"[{number}]".encode()))
    assert "too large" in message
    assert len(message) < 100


def test_an_integer_of_thousands_of_digits_is_refused_shortly() -> None:
    for digits in ("1" * 5_000, "-" + "9" * 5_000, "7" * 1_000_000):
        message = str(refusal(f"[{digits}]".encode()))
        assert "too large" in message
        assert digits[:10] in message
        assert len(message) < 100


def test_large_but_finite_numbers_pass() -> None:
    assert loads(b"[1e308, 18446744073709551615, 1e-320, -0.0]") == [1e308, 2**64 - 1, 1e-320, 0.0]
    assert math.copysign(1, loads(b"-0.0")) == -1


@pytest.mark.parametrize(
    "body", [b"\xff", b'"\xc3"', b'["\xed\xa0\x80"]', '"é"'.encode("latin-1"), "{}".encode("utf-16")]
)
def test_bytes_that_are_not_utf8_are_refused(body: bytes) -> None:
    assert "not UTF-8" in str(refusal(body))


def test_a_byte_order_mark_is_refused() -> None:
    assert "BOM" in str(refusal(b"\xef\xbb\xbf{}"))


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    assert "nested too deeply" in str(refusal(opening * 100_000))
    closing = b"]" if opening == b"[" else b"}"
    assert "nested too deeply" in str(refusal(opening * 100_000 + b"1" + closing * 100_000))


@pytest.mark.parametrize("body", [b"", b" ", b"\n"])
def test_an_empty_body_is_refused(body: bytes) -> None:
    assert "not valid JSON" in str(refusal(body))


@pytest.mark.parametrize("body", [b"{}x", b"{} {}", b'{"a": 1}}', b"[1] 2", b"{}\x00"])
def test_anything_after_the_value_is_refused(body: bytes) -> None:
    assert "Extra data" in str(refusal(body))


@pytest.mark.parametrize(
    "body",
    [
        b"{'a': 1}",
        b"{a: 1}",
        b"[1,]",
        b'{"a": 1,}',
        b"[01]",
        b"[1.]",
        b"[.5]",
        b"[+1]",
        b"nan",
        b"True",
        b"// x\n{}",
        b'"\n"',
        b'"\x00"',
        rb'"\x41"',
        rb'"\u12"',
        b'"open',
        b"[1",
        b"{",
        b"instances=To+be",
    ],
)
def test_what_is_almost_json_is_refused_with_its_place(body: bytes) -> None:
    message = str(refusal(body))
    assert "not valid JSON" in message
    assert "line" in message
    assert "column" in message


def test_printable_shortens_and_stays_ascii() -> None:
    assert printable("é\ud800") == '"\\u00e9\\ud800"'
    assert printable([1, None, True]) == "[1, null, true]"
    assert len(printable("x" * 10_000)) == 60


def test_printable_shows_whatever_loads_let_through() -> None:
    # Messages are made deeper in the stack than the body was parsed: what was just shallow enough there must do here.
    deepest, refused = 1, 1_000_000
    while refused - deepest > 1:
        depth = (deepest + refused) // 2
        try:
            loads(b"[" * depth + b"]" * depth)
            deepest = depth
        except InvalidRequest:
            refused = depth
    value = loads(b"[" * deepest + b"]" * deepest)

    def deeper(frames: int) -> str:
        return deeper(frames - 1) if frames else printable(value)

    assert 0 < len(deeper(20)) <= 60
