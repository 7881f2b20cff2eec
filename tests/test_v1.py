"""The V1 wire format: what a body may hold, and every form an answer takes."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.errors import InvalidRequest
from predictor.protocols.strict_json import loads
from predictor.protocols.v1 import Predict, parse
from predictor.protocols.wire import Limits
from predictor.text.request import Completion, LogProb

LIMITS = Limits(max_instances=4, max_timeout_s=60)


def refusal(body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body, LIMITS)
    assert len(str(caught.value)) < 250
    return caught.value


def completion(text: str, **changes: Any) -> Completion:
    fields = {
        "text": text, "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2, "seed": 7,
        "dtype": "int8", "logprobs": None, "top_logprobs": (),
    }  # fmt: skip
    return Completion(**(fields | changes))


def test_strings_are_prompts() -> None:
    predict = parse({"instances": ["one", "", "three\x00"]}, LIMITS)
    assert [row.request.prompt for row in predict.rows] == ["one", "", "three\x00"]
    assert [row.request.name for row in predict.rows] == ["instances[0]", "instances[1]", "instances[2]"]
    assert not predict.single
    assert not any(row.details or row.full_text for row in predict.rows)
    assert predict.rows[0].request.temperature == 0.7


@pytest.mark.parametrize(
    "extra", [{}, {"signature_name": "serving_default"}, {"signature_name": ""}, {"parameters": {}}]
)
def test_signature_and_parameters_may_be_absent(extra: dict[str, Any]) -> None:
    assert parse({"instances": ["a"]} | extra, LIMITS).rows == parse({"instances": ["a"]}, LIMITS).rows


def test_parameters_hold_for_every_row() -> None:
    predict = parse({"instances": ["a", {"prompt": "b"}], "parameters": {"top_k": 3, "details": True}}, LIMITS)
    assert [row.request.top_k for row in predict.rows] == [3, 3]
    assert all(row.details for row in predict.rows)


def test_an_instances_own_fields_override_parameters_for_that_row() -> None:
    body = {
        "instances": ["a", {"prompt": "b", "top_k": 9, "return_full_text": True, "stop": "x"}],
        "parameters": {"top_k": 3, "temperature": 0.1, "stop": ["y", "z"]},
    }
    first, second = parse(body, LIMITS).rows
    assert (first.request.top_k, second.request.top_k) == (3, 9)
    assert (first.request.temperature, second.request.temperature) == (0.1, 0.1)
    assert (first.full_text, second.full_text) == (False, True)
    assert (first.request.stop, second.request.stop) == (("y", "z"), ("x",))


@pytest.mark.parametrize(
    ("shared", "own", "field"),
    [
        ("max_new_tokens", "max_tokens", "max_new_tokens"),
        ("max_tokens", "max_new_tokens", "max_new_tokens"),
        ("max_tokens", "max_tokens", "max_new_tokens"),
        ("n", "num_return_sequences", "n"),
        ("num_return_sequences", "n", "n"),
    ],
)
def test_an_instance_overrides_by_alias_too(shared: str, own: str, field: str) -> None:
    body = {"instances": [{"prompt": "a", own: 5}, "b"], "parameters": {shared: 2}}
    assert [getattr(row.request, field) for row in parse(body, LIMITS).rows] == [5, 2]


def test_rules_that_join_fields_look_at_the_rows_final_parameters() -> None:
    body = {"instances": [{"prompt": "a", "max_new_tokens": 9}], "parameters": {"min_new_tokens": 5, "max_tokens": 4}}
    assert parse(body, LIMITS).rows[0].request.min_new_tokens == 5
    body = {"instances": [{"prompt": "a", "details": True}], "parameters": {"logprobs": 2}}
    assert parse(body, LIMITS).rows[0].request.logprobs == 2


def test_the_largest_batch_allowed_is_accepted() -> None:
    assert len(parse({"instances": ["a"] * 4}, LIMITS).rows) == 4


NO_STRING = "not formatted correctly. 'signature_name' key must be a string value."
MISSING = "Missing 'inputs' or 'instances' key"  # TensorFlow Serving's own words

# body, the field to blame, what the message must say
REFUSED: list[tuple[Any, str | None, list[str]]] = [
    # The body itself.
    ([], None, ["object"]),
    ("text", None, ["object"]),
    (None, None, ["object", "null"]),
    (5, None, ["object"]),
    ({}, "instances", [MISSING]),
    ({"parameters": {}}, "instances", [MISSING]),
    ({"prompt": "a"}, "instances", [MISSING]),
    ({"inputs": ["a"], "instances": ["a"]}, "inputs", ["expecting only one of 'inputs' or 'instances' keys to exist"]),
    ({"instances": ["a"], "paramters": {}}, "paramters", ["unknown field", "paramters"]),
    ({"instances": ["a"], "max_new_tokens": 5}, "max_new_tokens", ["unknown field", "max_new_tokens"]),
    ({"instances": ["a"], "text": "b"}, "text", ["text", "instances"]),
    ({"instances": ["a"], "length": 5}, "length", ["unknown field", "length"]),
    # signature_name
    (
        {"instances": ["a"], "signature_name": "other"},
        "signature_name",
        ['Serving signature name: "other" not found in signature def', "signature_name", "serving_default"],
    ),
    ({"instances": ["a"], "signature_name": 1}, "signature_name", [NO_STRING]),
    ({"instances": ["a"], "signature_name": None}, "signature_name", [NO_STRING]),
    ({"instances": ["a"], "signature_name": ["serving_default"]}, "signature_name", [NO_STRING]),
    ({"inputs": ["a"], "signature_name": False}, "signature_name", [NO_STRING]),
    # instances
    ({"instances": "a"}, "instances", ["Excepting 'instances' to be an list/array", '"a"']),
    ({"instances": {"prompt": "a"}}, "instances", ["list"]),
    ({"instances": None}, "instances", ["list", "null"]),
    ({"instances": 1}, "instances", ["list"]),
    ({"instances": []}, "instances", ["No values in 'instances' array"]),
    ({"instances": ["a"] * 5}, "instances", ["at most 4", "5"]),
    (
        {"instances": [1]},
        "instances[0]",
        ["instances[0]", "JSON Value: 1 Type: Number is not of expected type: string"],
    ),
    ({"instances": ["a", None]}, "instances[1]", ["Failed to process element: 1 of 'instances' list", "Type: Null"]),
    ({"instances": ["a", True]}, "instances[1]", ["instances[1]", "Type: True"]),
    ({"instances": [False]}, "instances[0]", ["instances[0]", "Type: False"]),
    ({"instances": [["a"]]}, "instances[0]", ["instances[0]", "Type: Array"]),
    ({"instances": [{}]}, "prompt", ["instances[0]", "prompt"]),
    ({"instances": ["a", {"top_k": 5}]}, "prompt", ["instances[1]", "prompt"]),
    ({"instances": [{"prompt": 5}]}, "prompt", ["prompt", "string"]),
    ({"instances": ["a", {"prompt": None}]}, "prompt", ["prompt", "string", "instances[1]"]),
    ({"instances": [{"prompt": ["a"]}]}, "prompt", ["prompt", "string"]),
    ({"instances": [{"prompt": {"text": "a"}}]}, "prompt", ["instances[0].prompt", "for base64 data", "string"]),
    ({"instances": [{"prompt": 5}]}, "prompt", ["Failed to process element: 0 key: prompt of 'instances' list"]),
    ({"instances": [{"text": "a"}]}, "prompt", ["prompt"]),
    ({"instances": ["a", {"prompt": "b", "top_k": -1}]}, "top_k", ["instances[1].top_k"]),
    ({"instances": [{"prompt": "b", "colour": 1}]}, "colour", ["instances[0]", "unknown field", "colour"]),
    ({"instances": [{"prompt": "b", "top_k": None}]}, "top_k", ["instances[0].top_k", "null"]),
    ({"instances": [{"prompt": "b", "n": 2, "num_return_sequences": 2}]}, "num_return_sequences", ["instances[0]"]),
    ({"instances": [{"prompt": "b", "stream": True}]}, "stream", ["instances[0]", "parameters"]),
    # inputs
    ({"inputs": None}, "inputs", ["inputs: JSON Value: null Type: Null is not of expected type: string"]),
    ({"inputs": 1.5}, "inputs", ["inputs: JSON Value: 1.5 Type: Number"]),
    ({"inputs": []}, "inputs", ["inputs must hold a prompt"]),
    ({"inputs": ["a", 5]}, "inputs[1]", ["inputs[1]: JSON Value: 5 Type: Number"]),
    ({"inputs": [["a"]]}, "inputs[0]", ["inputs[0]: Encountered list at unexpected level: 1 expected < 1"]),
    ({"inputs": ["a"] * 5}, "inputs", ["inputs must hold at most 4", "5"]),
    ({"inputs": {}}, "prompt", ["Missing named input: prompt in 'inputs' object."]),
    ({"inputs": {"text": "a"}}, "prompt", ["Missing named input: prompt in 'inputs' object."]),
    ({"inputs": {"prompt": "a", "top_k": 5}}, "top_k", ["inputs", "unknown input", "top_k"]),
    ({"inputs": {"prompt": "a", "stream": True}}, "stream", ["inputs", "unknown input", "stream"]),
    ({"inputs": {"prompt": []}}, "inputs.prompt", ["inputs.prompt must hold a prompt"]),
    ({"inputs": {"prompt": ["a"] * 5}}, "inputs.prompt", ["at most 4"]),
    ({"inputs": {"prompt": ["a", {}]}}, "inputs.prompt[1]", ["inputs.prompt[1]", "for base64 data"]),
    ({"inputs": ["a", {"prompt": "b"}]}, "inputs[1]", ["inputs[1]", "not formatted correctly for base64 data"]),
    ({"inputs": ["a"], "parameters": {"top_p": 0}}, "top_p", ["parameters.top_p"]),
    ({"inputs": ["a"], "parameters": {"logprobs": 2}}, "logprobs", ["inputs[0]", "details"]),
    ({"inputs": ["a"], "paramters": {}}, "paramters", ["unknown field", "paramters"]),
    # b64
    ({"inputs": {"b64": 5}}, "inputs", ["inputs: JSON Value", "not formatted correctly for base64 data"]),
    ({"inputs": {"b64": "Zm9", "prompt": "a"}}, "b64", ["unknown input", "b64"]),
    ({"inputs": {"b64": "Zm9v!"}}, "inputs", ["inputs: Unable to base64 decode", "Zm9v!"]),
    ({"inputs": {"b64": "Zm9vY"}}, "inputs", ["inputs: Unable to base64 decode"]),
    ({"inputs": {"b64": "Zm8=="}}, "inputs", ["inputs: Unable to base64 decode"]),
    ({"inputs": {"b64": "="}}, "inputs", ["inputs: Unable to base64 decode"]),
    ({"inputs": {"b64": "Zg==Zg=="}}, "inputs", ["inputs: Unable to base64 decode"]),
    ({"inputs": {"b64": "é"}}, "inputs", ["inputs: Unable to base64 decode"]),
    ({"inputs": ["a", {"b64": "Zv8="}]}, "inputs[1]", ["inputs[1]: the base64 data is not UTF-8: byte 1"]),
    ({"instances": ["a", {"b64": "*"}]}, "instances[1]", ["Failed to process element: 1 of 'instances'", "base64"]),
    ({"instances": [{"prompt": {"b64": "7aCA"}}]}, "prompt", ["instances[0].prompt", "not UTF-8"]),  # a lone surrogate
    ({"instances": [{"b64": "Zm9v", "top_k": 5}]}, "prompt", ["instances[0] lacks prompt"]),
    # parameters
    ({"instances": ["a"], "parameters": []}, "parameters", ["parameters", "object"]),
    ({"instances": ["a"], "parameters": None}, "parameters", ["parameters", "object"]),
    ({"instances": ["a"], "parameters": "greedy"}, "parameters", ["parameters", "object"]),
    ({"instances": ["a"], "parameters": {"prompt": "a"}}, "prompt", ["unknown field", "prompt"]),
    ({"instances": ["a"], "parameters": {"top_p": 0}}, "top_p", ["parameters.top_p"]),
    ({"instances": ["a"], "parameters": {"timeout_s": 61}}, "timeout_s", ["parameters.timeout_s", "60"]),
    ({"instances": ["a"], "parameters": {"stop": [""]}}, "stop", ["parameters.stop[0]"]),
    # Wrong where every instance overrides it: still wrong.
    ({"instances": [{"prompt": "a", "top_p": 1}], "parameters": {"top_p": 7}}, "top_p", ["parameters.top_p"]),
    # Rules that join fields.
    ({"instances": ["a"], "parameters": {"logprobs": 2}}, "logprobs", ["instances[0]", "details"]),
    (
        {"instances": ["a", {"prompt": "b", "min_new_tokens": 9}], "parameters": {"max_tokens": 8}},
        "min_new_tokens",
        ["instances[1]", "8", "9"],
    ),
    # The older body.
    ({"text": 5}, "text", ["text", "string"]),
    ({"text": None}, "text", ["text", "string"]),
    ({"text": ["a"]}, "text", ["text", "string"]),
    ({"text": {"prompt": "a"}}, "text", ["text", "string"]),
    ({"text": "a", "length": 0}, "length", ["length", "positive", "0"]),
    ({"text": "a", "length": -1}, "length", ["length", "positive", "-1"]),
    ({"text": "a", "length": True}, "length", ["length", "true"]),
    ({"text": "a", "length": 1.5}, "length", ["length", "1.5"]),
    ({"text": "a", "length": 5.0}, "length", ["length", "5.0"]),
    ({"text": "a", "length": "5"}, "length", ["length", '"5"']),
    ({"text": "a", "length": None}, "length", ["length", "null"]),
    ({"text": "a", "length": [5]}, "length", ["length"]),
    ({"text": "a", "colour": 1}, "colour", ["unknown field", "colour"]),
    ({"text": "a", "prompt": "b"}, "prompt", ["unknown field", "prompt"]),
    ({"text": "a", "parameters": {}}, "parameters", ["unknown field", "parameters"]),
    ({"text": "a", "signature_name": "serving_default"}, "signature_name", ["unknown field", "signature_name"]),
    ({"text": "a", "inputs": ["b"]}, "inputs", ["unknown field", "inputs"]),
    ({"text": "a", "max_new_tokens": 5}, "max_new_tokens", ["max_new_tokens", "length"]),
    ({"text": "a", "max_tokens": 5}, "max_tokens", ["max_tokens", "length"]),
    ({"text": "a", "length": 9, "max_new_tokens": 5}, "max_new_tokens", ["max_new_tokens", "length"]),
    ({"text": "a", "temperature": "hot"}, "temperature", ["temperature", "number"]),
    ({"text": "a", "temperature": None}, "temperature", ["temperature", "null"]),
    ({"text": "a", "logprobs": 2}, "logprobs", ["logprobs", "details"]),
]


@pytest.mark.parametrize(("body", "param", "said"), REFUSED)
def test_a_wrong_body_is_refused_by_the_fields_name(body: Any, param: str | None, said: list[str]) -> None:
    error = refusal(body)
    assert error.param == param
    for text in said:
        assert text in str(error), f"{text!r} not in {str(error)!r}"


def nested(depth: int, form: str) -> bytes:
    return form.replace("%s", "[" * depth + "]" * depth).encode()


def deepest_parsed() -> int:
    """The depth past which `loads` refuses; it depends on the Python version and on the stack."""
    accepted, refused = 1, 1_000_000
    while refused - accepted > 1:
        depth = (accepted + refused) // 2
        try:
            loads(nested(depth, "%s"))
            accepted = depth
        except InvalidRequest:
            refused = depth
    return accepted


NESTED = ["%s", '{"instances": %s}', '{"instances": ["a"], "parameters": {"top_k": %s}}', '{"text": %s}']


@pytest.mark.parametrize("form", NESTED)
def test_a_nested_value_is_refused_at_every_depth(form: str) -> None:
    # The message about a body that was just shallow enough to parse is made deeper in the stack.
    deepest = deepest_parsed()
    for depth in range(deepest - 25, deepest + 3):
        with pytest.raises(InvalidRequest):
            parse(loads(nested(depth, form)), LIMITS)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = ["prompt", "max_new_tokens", "max_tokens", "temperature", "top_k", "stop", "logit_bias", "seed", "n", "details"]


@given(
    body=st.dictionaries(
        st.sampled_from(
            ["instances", "parameters", "signature_name", "text", "length", "inputs", "top_k", "stop", "x"]
        ),
        JSON_VALUES
        | st.just(["a"])
        | st.dictionaries(st.sampled_from(NAMES), JSON_VALUES)
        | st.lists(st.dictionaries(st.sampled_from(NAMES), JSON_VALUES), max_size=3),
    )
)
@settings(deadline=None, max_examples=120)
def test_any_json_is_a_request_or_a_refusal_that_can_be_sent(body: dict[str, Any]) -> None:
    try:
        predict = parse(body, LIMITS)
    except InvalidRequest as error:
        json.dumps({"error": str(error)}).encode()
        return
    assert 1 <= len(predict.rows) <= 4


# The column form, and binary strings.


@pytest.mark.parametrize(
    ("inputs", "prompts", "names"),
    [
        ("one", ["one"], ["inputs"]),
        ("", [""], ["inputs"]),
        (["one"], ["one"], ["inputs[0]"]),
        (["one", {"b64": "dHdv"}], ["one", "two"], ["inputs[0]", "inputs[1]"]),
        ({"b64": "b25l"}, ["one"], ["inputs"]),
        ({"prompt": "one"}, ["one"], ["inputs.prompt"]),
        ({"prompt": {"b64": "b25l"}}, ["one"], ["inputs.prompt"]),
        ({"prompt": ["one", "two"]}, ["one", "two"], ["inputs.prompt[0]", "inputs.prompt[1]"]),
    ],
)
def test_a_column_is_a_string_or_a_list_by_itself_or_by_its_name(
    inputs: Any, prompts: list[str], names: list[str]
) -> None:
    predict = parse({"inputs": inputs, "parameters": {"top_k": 3}}, LIMITS)
    assert [row.request.prompt for row in predict.rows] == prompts
    assert [row.request.name for row in predict.rows] == names
    assert all(row.request.top_k == 3 for row in predict.rows)


@pytest.mark.parametrize(("inputs", "outputs"), [("a", "1"), (["a"], ["1"]), (["a", "b"], ["1", "2"])])
def test_outputs_have_the_shape_of_inputs(inputs: Any, outputs: Any) -> None:
    for column in (inputs, {"prompt": inputs}):
        results = [[completion(text)] for text in outputs]
        assert answer({"inputs": column}, results) == {"outputs": outputs}


def test_several_samples_of_a_column_add_a_dimension() -> None:
    results = [[completion("1"), completion("2")]]
    assert answer({"inputs": "a", "parameters": {"n": 2}}, results) == {"outputs": ["1", "2"]}
    assert answer({"inputs": ["a"], "parameters": {"n": 2}}, results) == {"outputs": [["1", "2"]]}


def test_an_instance_may_be_binary_by_itself_and_by_its_name() -> None:
    body = {"instances": [{"b64": "b25l"}, {"prompt": {"b64": "b25l"}, "top_k": 3}, "one"]}
    rows = parse(body, LIMITS).rows
    assert [row.request.prompt for row in rows] == ["one"] * 3
    assert [row.request.top_k for row in rows] == [None, 3, None]


@given(text=st.text(), white=st.sampled_from(["", " ", "\n"]), padded=st.booleans())
@settings(deadline=None, max_examples=50)
def test_base64_of_any_text_is_that_text(text: str, white: str, padded: bool) -> None:
    encoded = base64.b64encode(text.encode()).decode()
    sent = white.join(encoded if padded else encoded.rstrip("="))
    assert parse({"instances": [{"b64": sent}]}, LIMITS).rows[0].request.prompt == text


# The older body.


def test_the_older_body_means_a_total_length_and_answers_prompt_and_completion_together() -> None:
    predict = parse({"text": "Once", "length": 20}, LIMITS)
    (row,) = predict.rows
    assert predict.single
    assert (row.request.prompt, row.request.max_total_tokens, row.request.max_new_tokens) == ("Once", 20, None)
    assert row.full_text


def test_the_older_bodys_length_is_64_by_default() -> None:
    assert parse({"text": "Once"}, LIMITS).rows[0].request.max_total_tokens == 64


def test_the_older_body_takes_the_parameters_beside_text() -> None:
    (row,) = parse({"text": "Once", "top_k": 3, "seed": 5, "stop": "x", "return_full_text": False}, LIMITS).rows
    assert (row.request.top_k, row.request.seed, row.request.stop, row.full_text) == (3, 5, ("x",), False)


def test_the_older_body_may_slide() -> None:
    (row,) = parse({"text": "Once", "length": 5000, "context_overflow": "slide"}, LIMITS).rows
    assert (row.request.max_total_tokens, row.request.context_overflow) == (5000, "slide")


# Answers.


def answer(body: dict[str, Any], results: list[list[Completion]]) -> Any:
    rendered = parse(body, LIMITS).render(results)
    return json.loads(json.dumps(rendered))


def test_a_prediction_is_the_completion() -> None:
    assert answer({"instances": ["a", "b"]}, [[completion(" x")], [completion("")]]) == {"predictions": [" x", ""]}


def test_return_full_text_adds_the_prompt() -> None:
    body = {"instances": ["a", {"prompt": "b", "return_full_text": False}], "parameters": {"return_full_text": True}}
    assert answer(body, [[completion(" x")], [completion(" y")]]) == {"predictions": ["a x", " y"]}


def test_details_tell_counts_reason_seed_and_dtype() -> None:
    body = {"instances": ["a"], "parameters": {"details": True}}
    assert answer(body, [[completion(" x", finish_reason="length", seed=2**64 - 1)]]) == {
        "predictions": [
            {
                "text": " x",
                "finish_reason": "length",
                "prompt_tokens": 3,
                "completion_tokens": 2,
                "seed": 2**64 - 1,
                "dtype": "int8",
                "logprobs": None,
            }
        ]
    }


def test_details_with_return_full_text_hold_both_texts() -> None:
    body = {"instances": ["a"], "parameters": {"details": True, "return_full_text": True}}
    assert answer(body, [[completion(" x")]])["predictions"][0]["text"] == "a x"


def test_logprobs_stand_in_details() -> None:
    body = {"instances": ["a"], "parameters": {"details": True, "logprobs": 2}}
    chosen = (LogProb(5, " x", -0.5), LogProb(6, "y", -1.5))
    top = ((LogProb(5, " x", -0.5), LogProb(9, "z", -2.0)), (LogProb(8, "w", -0.1), LogProb(6, "y", -1.5)))
    rendered = answer(body, [[completion(" xy", logprobs=chosen, top_logprobs=top)]])
    assert rendered["predictions"][0]["logprobs"] == {
        "token_ids": [5, 6],
        "tokens": [" x", "y"],
        "token_logprobs": [-0.5, -1.5],
        "top_logprobs": [
            [{"token_id": 5, "token": " x", "logprob": -0.5}, {"token_id": 9, "token": "z", "logprob": -2.0}],
            [{"token_id": 8, "token": "w", "logprob": -0.1}, {"token_id": 6, "token": "y", "logprob": -1.5}],
        ],
    }


def test_several_samples_are_a_list_per_row() -> None:
    body = {"instances": ["a", {"prompt": "b", "n": 1}, {"prompt": "c", "details": True}], "parameters": {"n": 2}}
    results = [[completion("1"), completion("2")], [completion("3")], [completion("4"), completion("5", seed=8)]]
    first, second, third = answer(body, results)["predictions"]
    assert (first, second) == (["1", "2"], "3")
    assert [(each["text"], each["seed"]) for each in third] == [("4", 7), ("5", 8)]


def test_the_older_body_is_answered_with_one_prediction() -> None:
    assert answer({"text": "Once"}, [[completion(" upon")]]) == {"prediction": "Once upon"}
    assert answer({"text": "Once", "n": 2}, [[completion("1"), completion("2")]]) == {"prediction": ["Once1", "Once2"]}
    detailed = answer({"text": "Once", "details": True}, [[completion(" upon")]])["prediction"]
    assert (detailed["text"], detailed["completion_tokens"]) == ("Once upon", 2)


def test_as_many_results_as_rows_are_expected() -> None:
    predict = parse({"instances": ["a", "b"]}, LIMITS)
    assert isinstance(predict, Predict)
    with pytest.raises(ValueError, match="zip"):
        predict.render([[completion("x")]])
