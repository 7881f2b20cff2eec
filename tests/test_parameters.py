"""Every row of DESIGN's table of parameters: default, both ends of its range, what is outside, every wrong type."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from predictor.errors import InvalidRequest
from predictor.protocols.parameters import Parameters, override, parse_parameters
from predictor.text.language_model import LanguageModel
from tests.conftest import byte_tokenizer

MAX_TIMEOUT_S = 60.0
CONTEXT, VOCABULARY = 128, 277


def parse(fields: dict[str, Any]) -> Parameters:
    return parse_parameters(fields, "parameters", MAX_TIMEOUT_S)


def refusal(fields: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(fields)
    return caught.value


def assert_refused(field: str, value: Any, *said: str) -> None:
    error = refusal({field: value})
    assert error.param == field
    assert field in str(error)
    for text in said:
        assert text in str(error), f"{text!r} not in {str(error)!r}"
    assert len(str(error)) < 250


DEFAULTS: dict[str, Any] = {
    "max_new_tokens": None,  # 64, or what the context leaves: see below
    "context_overflow": "error",
    "min_new_tokens": 0,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": None,  # 50, or the vocabulary where that is smaller
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "bad_words": [],
    "stop": [],
    "seed": None,
    "n": 1,
    "ignore_eos": False,
    "logprobs": None,
    "return_full_text": False,
    "details": False,
    "stream": False,
    "timeout_s": None,
}


def test_defaults_are_the_tables() -> None:
    assert parse({}).model_dump() == DEFAULTS


ACCEPTED = [
    ("max_new_tokens", [1, 1024]),
    ("max_tokens", [1, 1024]),
    ("context_overflow", ["error", "slide"]),
    ("min_new_tokens", [0, 1024]),
    ("do_sample", [True, False]),
    ("temperature", [0, 0.0, 1, 100, 100.0, 1e-320, -0.0]),
    ("top_k", [0, 1, 50257]),
    ("top_p", [5e-324, 0.5, 1, 1.0]),
    ("repetition_penalty", [5e-324, 1, 10, 10.0]),
    ("presence_penalty", [-2, 0, 2, -2.0, 2.0]),
    ("frequency_penalty", [-2, 0, 2, -2.0, 2.0]),
    ("logit_bias", [{}, {"0": -100}, {"50256": 100.0}, {str(i): 0.5 for i in range(1024)}]),
    ("bad_words", [[], ["x"], ["x" * 256], [str(i) for i in range(256)], ["\x00", "😀"]]),
    ("stop", [[], ["x"], ["x" * 256], [str(i) for i in range(16)], ["😀" * 256], ["\n", "\n"]]),
    ("seed", [0, 1, 2**63, 2**64 - 1]),
    ("n", [1, 16]),
    ("num_return_sequences", [1, 16]),
    ("ignore_eos", [True, False]),
    ("logprobs", [0, 20]),
    ("return_full_text", [True, False]),
    ("details", [True, False]),
    ("stream", [False]),
    ("timeout_s", [5e-324, 0.5, 1, 60, 60.0]),
]
OUR_NAME = {"max_tokens": "max_new_tokens", "num_return_sequences": "n"}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ACCEPTED for value in values])
def test_the_whole_range_is_accepted_up_to_both_ends(field: str, value: Any) -> None:
    assert getattr(parse({field: value}), OUR_NAME.get(field, field)) == value


OUTSIDE = [
    ("max_new_tokens", 0, "1"),
    ("max_new_tokens", -1, "1"),
    ("max_tokens", 0, "1"),
    ("context_overflow", "truncate", "'error' or 'slide'"),
    ("context_overflow", "Slide", "'error' or 'slide'"),
    ("context_overflow", "", "'error' or 'slide'"),
    ("min_new_tokens", -1, "0"),
    ("temperature", -1e-9, "0"),
    ("temperature", 100.000001, "100"),
    ("temperature", 101, "100"),
    ("top_k", -1, "0"),
    ("top_p", 0, "0"),
    ("top_p", -0.1, "0"),
    ("top_p", 1.0000001, "1"),
    ("top_p", 2, "1"),
    ("repetition_penalty", 0, "0"),
    ("repetition_penalty", -1, "0"),
    ("repetition_penalty", 10.000001, "10"),
    ("presence_penalty", -2.000001, "-2"),
    ("presence_penalty", 2.000001, "2"),
    ("frequency_penalty", -2.000001, "-2"),
    ("frequency_penalty", 2.000001, "2"),
    ("logit_bias", {str(i): 0 for i in range(1025)}, "1024"),
    ("logit_bias", {"5": 100.5}, "100"),
    ("logit_bias", {"5": -100.5}, "-100"),
    ("bad_words", [str(i) for i in range(257)], "256"),
    ("bad_words", ["ok", ""], "1"),
    ("bad_words", ["x" * 257], "256"),
    ("stop", [str(i) for i in range(17)], "16"),
    ("stop", [""], "1"),
    ("stop", ["ok", ""], "1"),
    ("stop", "", "1"),
    ("stop", ["x" * 257], "256"),
    ("stop", "x" * 257, "256"),
    ("seed", -1, "0"),
    ("seed", 2**64, str(2**64 - 1)),
    ("n", 0, "1"),
    ("n", 17, "16"),
    ("num_return_sequences", 17, "16"),
    ("logprobs", -1, "0"),
    ("logprobs", 21, "20"),
    ("timeout_s", 0, "0"),
    ("timeout_s", -5, "0"),
    ("timeout_s", 60.5, "60"),
]


@pytest.mark.parametrize(("field", "value", "limit"), OUTSIDE)
def test_just_outside_the_range_is_refused_with_the_field_and_the_limit(field: str, value: Any, limit: str) -> None:
    assert_refused(field, value, limit)


INTEGERS = ["max_new_tokens", "max_tokens", "min_new_tokens", "top_k", "seed", "n", "num_return_sequences", "logprobs"]
NUMBERS = ["temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "timeout_s"]
BOOLEANS = ["do_sample", "ignore_eos", "return_full_text", "details", "stream"]
LISTS = ["bad_words", "stop"]
EVERY_FIELD = [*INTEGERS, *NUMBERS, *BOOLEANS, *LISTS, "logit_bias", "context_overflow"]

WRONG_TYPES = [
    *((field, value) for field in INTEGERS for value in (True, False, 3.0, 1.5, "3", [3], {"value": 3})),
    *((field, value) for field in NUMBERS for value in (True, False, "0.7", [0.7], {"value": 0.7})),
    *((field, value) for field in BOOLEANS for value in (0, 1, 0.0, 1.0, "true", "", [True], {})),
    *(("context_overflow", value) for value in (True, 0, 1.5, ["slide"], {"slide": True})),
    *(("stop", value) for value in (1, 0.5, True, {"a": "b"}, [1], [None], [["a"]], [True])),
    *(("bad_words", value) for value in ("word", 1, 0.5, True, {"a": "b"}, [1], [None], [["a"]])),
    *(("logit_bias", value) for value in ("5", 5, 0.5, True, [], [[5, 1]])),
    *(("logit_bias", {"5": value}) for value in (True, "1", None, [1], {})),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_a_wrong_type_is_refused_by_the_fields_name(field: str, value: Any) -> None:
    assert_refused(field, value)


def test_every_field_of_the_table_is_tried_with_wrong_types() -> None:
    assert {OUR_NAME.get(field, field) for field in EVERY_FIELD} == set(DEFAULTS)


@pytest.mark.parametrize("field", EVERY_FIELD)
def test_null_is_refused_by_the_fields_name(field: str) -> None:
    assert_refused(field, None, "null")


@pytest.mark.parametrize("field", [*INTEGERS, *NUMBERS])
def test_an_enormous_integer_is_no_crash(field: str) -> None:
    for value in (10**390, -(10**390)):
        said = field
        try:
            parse({field: value})
        except InvalidRequest as error:
            said = str(error)
        assert field in said
        assert len(said) < 250


@pytest.mark.parametrize(
    "key", ["-1", "1.5", "01", "00", "x", "", " 1", "1 ", "1\n", "+1", "1e3", "0x1", "\u0661", "1_0", "9" * 10]
)
def test_a_logit_bias_key_that_is_no_token_id_is_refused(key: str) -> None:
    assert_refused("logit_bias", {key: 1}, "token ids")


def test_logit_bias_tells_which_entry_is_out_of_range() -> None:
    assert "logit_bias.7 " in str(refusal({"logit_bias": {"5": 1, "7": 101}}))


def test_a_list_tells_which_item_is_wrong() -> None:
    assert "stop[1] " in str(refusal({"stop": ["ok", ""]}))
    assert "bad_words[2] " in str(refusal({"bad_words": ["a", "b", 3]}))


def test_one_stop_string_needs_no_list() -> None:
    assert parse({"stop": "\n"}).stop == ["\n"]


@pytest.mark.parametrize("field", ["foo", "Temperature", "max_length", "prompt", "", "é", "x" * 1000])
def test_an_unknown_field_is_refused_by_name(field: str) -> None:
    error = refusal({field: 1})
    assert "unknown field" in str(error)
    assert error.param == field
    assert len(str(error)) < 200


@pytest.mark.parametrize(
    ("alias", "name", "value"), [("max_tokens", "max_new_tokens", 5), ("num_return_sequences", "n", 3)]
)
def test_an_alias_means_its_field(alias: str, name: str, value: int) -> None:
    assert parse({alias: value}) == parse({name: value})
    error = refusal({alias: value, name: value})
    assert alias in str(error)
    assert name in str(error)
    assert error.param == alias


def test_stream_is_a_boolean() -> None:
    assert parse_parameters({"stream": True}, "parameters", MAX_TIMEOUT_S).stream
    assert_refused("stream", 1)


def test_the_message_says_which_object_is_wrong() -> None:
    with pytest.raises(InvalidRequest, match=r"^instances\[2\]\.top_p "):
        parse_parameters({"top_p": 7}, "instances[2]", MAX_TIMEOUT_S)


@pytest.mark.parametrize(
    ("shared", "own", "result"),
    [
        ({"temperature": 1, "top_k": 5}, {"temperature": 2}, {"temperature": 2, "top_k": 5}),
        ({"max_new_tokens": 1}, {"max_tokens": 2}, {"max_tokens": 2}),
        ({"max_tokens": 1}, {"max_new_tokens": 2}, {"max_new_tokens": 2}),
        ({"n": 1}, {"num_return_sequences": 2}, {"num_return_sequences": 2}),
        ({"seed": 1}, {}, {"seed": 1}),
        ({}, {"seed": 1}, {"seed": 1}),
    ],
)
def test_own_fields_take_the_place_of_shared_ones_under_either_name(
    shared: dict[str, Any], own: dict[str, Any], result: dict[str, Any]
) -> None:
    before = dict(shared)
    assert override(shared, own) == result
    assert shared == before


def check_together(fields: dict[str, Any]) -> None:
    parse(fields).check_together("instances[1]")


@pytest.mark.parametrize("field", ["max_new_tokens", "max_tokens"])
def test_min_new_tokens_above_max_new_tokens_is_refused(field: str) -> None:
    check_together({field: 5, "min_new_tokens": 5})
    with pytest.raises(InvalidRequest, match=r"instances\[1\].*min_new_tokens.*5.*6") as caught:
        check_together({field: 5, "min_new_tokens": 6})
    assert caught.value.param == "min_new_tokens"


def test_logprobs_without_details_is_refused() -> None:
    for number in (0, 5):
        check_together({"logprobs": number, "details": True})
        with pytest.raises(InvalidRequest, match=r"instances\[1\].*logprobs.*details") as caught:
            check_together({"logprobs": number})
        assert caught.value.param == "logprobs"


def test_a_request_carries_every_field_on() -> None:
    fields = {
        "max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "n": 3, "seed": 11,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3, "logit_bias": {"5": 1.5},
        "context_overflow": "slide",
        "bad_words": ["b"], "stop": ["s"], "ignore_eos": True, "logprobs": 4, "timeout_s": 2.5, "details": True,
    }  # fmt: skip
    request = parse(fields).request("the prompt", "instances[4]")
    for field, value in fields.items():
        if field != "details":
            expected = {"logit_bias": {5: 1.5}, "bad_words": ("b",), "stop": ("s",)}.get(field, value)
            assert getattr(request, field) == expected
    assert (request.prompt, request.name, request.max_total_tokens) == ("the prompt", "instances[4]", None)


def test_do_sample_false_is_greedy_whatever_the_temperature() -> None:
    assert parse({"do_sample": False, "temperature": 1.5}).request("p", "x").temperature == 0
    assert parse({"do_sample": True, "temperature": 1.5}).request("p", "x").temperature == 1.5


# The limits that depend on the model: its context and its vocabulary.


def prepared(prompt: str, fields: dict[str, Any], vocabulary: int = VOCABULARY, **changes: Any) -> Any:
    backend = SimpleNamespace(
        tokenizer=byte_tokenizer(), context=CONTEXT, vocabulary=vocabulary, check=lambda params: None
    )
    request = parse(fields).request(prompt, "instances[0]")
    return LanguageModel(backend).preparer.prepare(replace(request, **changes))


def test_by_default_64_new_tokens_or_what_the_context_leaves() -> None:
    assert prepared("a", {}).params.max_new_tokens == 64
    assert prepared("a" * 100, {}).params.max_new_tokens == 28


def test_a_minimum_above_the_default_raises_the_default() -> None:
    assert prepared("a", {"min_new_tokens": 100}).params.max_new_tokens == 100


@pytest.mark.parametrize("field", ["max_new_tokens", "max_tokens"])
def test_max_new_tokens_ends_at_the_context(field: str) -> None:
    assert prepared("a", {field: CONTEXT - 1}).params.max_new_tokens == CONTEXT - 1
    with pytest.raises(InvalidRequest, match=r"max_new_tokens.*127.*128") as caught:
        prepared("a", {field: CONTEXT})
    assert caught.value.param == "max_new_tokens"


def test_min_new_tokens_ends_at_what_the_context_leaves() -> None:
    assert prepared("a", {"min_new_tokens": CONTEXT - 1}).params.min_new_tokens == CONTEXT - 1
    with pytest.raises(InvalidRequest, match=r"min_new_tokens.*127.*128"):
        prepared("a", {"min_new_tokens": CONTEXT})


def test_by_default_top_k_is_50_or_the_vocabulary_where_that_is_smaller() -> None:
    assert prepared("a", {}).params.top_k == 50
    assert prepared("a", {}, vocabulary=20).params.top_k == 20


def test_top_k_ends_at_the_vocabulary() -> None:
    assert prepared("a", {"top_k": VOCABULARY}).params.top_k == VOCABULARY
    with pytest.raises(InvalidRequest, match=rf"top_k.*{VOCABULARY}.*{VOCABULARY + 1}"):
        prepared("a", {"top_k": VOCABULARY + 1})


def test_logit_bias_ends_at_the_vocabulary() -> None:
    assert prepared("a", {"logit_bias": {str(VOCABULARY - 1): 1}}).params.logit_bias == {VOCABULARY - 1: 1}
    with pytest.raises(InvalidRequest, match=rf"logit_bias.*{VOCABULARY}"):
        prepared("a", {"logit_bias": {str(VOCABULARY): 1}})


def test_a_prompt_must_leave_room_for_one_token() -> None:
    assert prepared("a" * (CONTEXT - 1), {}).params.max_new_tokens == 1
    for length in (CONTEXT, CONTEXT + 1, 100_000):
        with pytest.raises(InvalidRequest, match=rf"instances\[0\].*context of {CONTEXT}") as caught:
            prepared("a" * length, {})
        assert caught.value.param == "prompt"


def test_an_empty_prompt_is_the_end_of_text_token() -> None:
    assert prepared("", {}).prompt.ids == [0]


def test_a_total_length_is_what_the_prompt_leaves_of_it_and_is_capped_at_the_context() -> None:
    assert prepared("abcde", {}, max_total_tokens=20).params.max_new_tokens == 15
    assert prepared("abcde", {}, max_total_tokens=6).params.max_new_tokens == 1
    assert prepared("abcde", {}, max_total_tokens=10**9).params.max_new_tokens == CONTEXT - 5
    with pytest.raises(InvalidRequest, match=r"length.*5") as caught:
        prepared("abcde", {}, max_total_tokens=5)
    assert caught.value.param == "length"


SLIDE = {"context_overflow": "slide"}
LONGEST = 16 * CONTEXT


def test_sliding_tells_the_engine_the_window_and_leaves_the_defaults() -> None:
    assert prepared("a", {}).params.window is None
    params = prepared("a", SLIDE).params
    assert (params.window, params.max_new_tokens) == (CONTEXT, 64)
    assert prepared("a" * 100, SLIDE).params.max_new_tokens == 64
    assert prepared("a", {"min_new_tokens": 300} | SLIDE).params.max_new_tokens == 300


@pytest.mark.parametrize("field", ["max_new_tokens", "max_tokens"])
def test_sliding_ends_at_sixteen_contexts(field: str) -> None:
    assert prepared("a", {field: LONGEST - 1} | SLIDE).params.max_new_tokens == LONGEST - 1
    with pytest.raises(InvalidRequest, match=r"max_new_tokens.*2047.*16 times the context of 128") as caught:
        prepared("a", {field: LONGEST} | SLIDE)
    assert caught.value.param == "max_new_tokens"


def test_a_prompt_past_the_context_slides_up_to_sixteen_contexts() -> None:
    for length in (CONTEXT - 1, CONTEXT, CONTEXT + 1, LONGEST - 64):
        ready = prepared("a" * length, SLIDE)
        assert (len(ready.prompt.ids), ready.params.max_new_tokens) == (length, 64)
    assert prepared("a" * (LONGEST - 1), SLIDE).params.max_new_tokens == 1
    for length in (LONGEST, LONGEST + 1, 100_000):
        with pytest.raises(InvalidRequest, match=r"instances\[0\].*16 times the context of 128") as caught:
            prepared("a" * length, SLIDE)
        assert caught.value.param == "prompt"


def test_a_total_length_slides_up_to_sixteen_contexts() -> None:
    assert prepared("abcde", SLIDE, max_total_tokens=1000).params.max_new_tokens == 995
    assert prepared("abcde", SLIDE, max_total_tokens=10**9).params.max_new_tokens == LONGEST - 5
    with pytest.raises(InvalidRequest, match=r"length.*200") as caught:
        prepared("a" * 200, SLIDE, max_total_tokens=200)
    assert caught.value.param == "length"


def test_an_absent_seed_is_drawn_anew_each_time() -> None:
    seeds = {prepared("a", {}).params.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert prepared("a", {"seed": 0}).params.seed == 0
