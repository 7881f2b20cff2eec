"""Chats as OpenAI's own client sees them, against a real process; their prompts are held to transformers' rendering."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from openai.types.chat import ChatCompletion

from predictor.errors import ConfigurationError, InvalidRequest
from predictor.text.chat import ChatTemplate, read_template
from predictor.text.request import ChatMessage
from tests.conftest import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from tests.processes import ServerProcess, serving

HELLO = [{"role": "user", "content": "hello"}]
CONTEXT = 128


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("chat")
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    flags = ["--model", f"tiny={checkpoint}", "--jobs", "none", "--chat-template", str(template)]
    with serving(folder / "log", *flags) as opened:
        opened.wait_until_ready("tiny")
        yield opened


@pytest.fixture
def openai(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as opened:
        yield opened


def chat(openai: OpenAI, messages: Any = HELLO, **fields: Any) -> ChatCompletion:
    return openai.chat.completions.create(model="tiny", messages=messages, **fields)


def texts(answer: ChatCompletion) -> list[str | None]:
    return [choice.message.content for choice in answer.choices]


def rendered(messages: Any) -> str:
    """What transformers makes of messages."""
    return str(
        byte_tokenizer().apply_chat_template(
            messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
    )


CHATS: dict[str, Any] = {
    "one": HELLO,
    "several": [
        {"role": "system", "content": "be the word"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "there"},
        {"role": "developer", "content": "the world"},
        {"role": "user", "content": ""},
    ],
    "names": [
        {"role": "user", "name": "romeo", "content": "é"},
        {"role": "user", "name": "julia", "content": "\U0001f600"},
    ],
}


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_a_chat_is_the_completion_of_what_transformers_renders(openai: OpenAI, messages: Any) -> None:
    answer = chat(openai, messages, max_completion_tokens=20, seed=4)
    whole = openai.completions.create(model="tiny", prompt=rendered(messages), max_tokens=20, seed=4)
    assert texts(answer) == [whole.choices[0].text]
    assert answer.usage == whole.usage
    assert answer.choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_parts_of_a_content_are_lines(openai: OpenAI) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    in_parts = chat(openai, [{"role": "user", "content": parts}], seed=4, max_tokens=20)
    assert texts(in_parts) == texts(chat(openai, [{"role": "user", "content": "hello\nworld"}], seed=4, max_tokens=20))


def test_an_answer_is_the_next_requests_message(openai: OpenAI) -> None:
    """As users of OpenAI's client go on: with the object, or with all of its fields."""
    said = chat(openai, seed=4, max_tokens=5).choices[0].message
    wanted = chat(openai, [*HELLO, {"role": "assistant", "content": said.content}, *HELLO], seed=4, max_tokens=5)
    for again in (said, said.model_dump()):
        assert texts(chat(openai, [*HELLO, again, *HELLO], seed=4, max_tokens=5)) == texts(wanted)


def test_the_answer_has_every_field(openai: OpenAI) -> None:
    answer = chat(openai, max_completion_tokens=5, extra_body={"ignore_eos": True})
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "tiny", "float32")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.refusal) == ("assistant", None)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_a_message_may_fill_the_context(openai: OpenAI) -> None:
    answer = chat(openai, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == CONTEXT


# A chat's fields, and the completion's where they are called otherwise.
@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"max_tokens": 9}, {}),
        ({"max_tokens": 9, "temperature": 0}, {}),
        ({"max_tokens": 9, "temperature": 2, "top_p": 0.5}, {}),
        ({"max_tokens": 9, "presence_penalty": 2, "frequency_penalty": -1}, {}),
        ({"max_tokens": 9, "logit_bias": {"40": 4}}, {}),
        ({"max_tokens": 30, "stop": ["e", "T"]}, {}),
        ({"max_tokens": 9, "n": 3}, {}),
        ({"max_tokens": 9, "user": "me", "stream": None, "tools": None, "response_format": None}, "nothing"),
        ({"max_tokens": 9, "response_format": {"type": "text"}}, "nothing"),
        ({"max_tokens": 9, "extra_body": {"top_k": 3, "repetition_penalty": 2, "min_new_tokens": 9}}, {}),
    ],
    ids=str,
)
def test_a_field_does_what_it_does_to_completions(openai: OpenAI, fields: dict[str, Any], same: Any) -> None:
    theirs = {"max_tokens": 9} if same == "nothing" else same or fields
    whole = openai.completions.create(model="tiny", prompt=rendered(HELLO), seed=11, **theirs)
    assert texts(chat(openai, seed=11, **fields)) == [choice.text for choice in whole.choices]


def test_logprobs_are_those_of_the_completion(openai: OpenAI) -> None:
    asked = {"seed": 9, "max_tokens": 30}
    told = chat(openai, logprobs=True, top_logprobs=5, **asked).choices[0].logprobs
    whole = openai.completions.create(model="tiny", prompt=rendered(HELLO), logprobs=5, **asked).choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert whole is not None
    assert len(told.content) == 30
    assert [each.logprob for each in told.content] == whole.token_logprobs
    assert any("\ufffd" in each.token for each in told.content), "some are parts of characters"
    for each, likeliest in zip(told.content, whole.top_logprobs or [], strict=True):
        assert len(each.top_logprobs) == 5
        assert [top.logprob for top in each.top_logprobs] == list(likeliest.values())[:5]
    plain = chat(openai, logprobs=True, **asked).choices[0].logprobs
    assert [each.top_logprobs for each in (plain.content if plain else None) or []] == [[]] * 30


def test_the_bytes_of_the_tokens_are_the_text(openai: OpenAI) -> None:
    """A character of two tokens is whole only in their bytes."""
    two = byte_tokenizer()("é")["input_ids"]
    for token_id in two:
        answer = chat(openai, max_tokens=1, logprobs=True, logit_bias={str(token_id): 100})
        (told,) = (answer.choices[0].logprobs.content if answer.choices[0].logprobs else None) or []
        assert told.token == "\ufffd"
        assert told.bytes == list("é".encode()[two.index(token_id) :][:1])
    answer = chat(
        openai, max_tokens=3, logprobs=True, logit_bias={str(byte_tokenizer()(" banana")["input_ids"][0]): 100}
    )
    told_all = (answer.choices[0].logprobs.content if answer.choices[0].logprobs else None) or []
    assert b"".join(bytes(each.bytes or []) for each in told_all).decode() == texts(answer)[0] == " banana" * 3
    ended = chat(openai, max_tokens=3, logprobs=True, logit_bias={"0": 100}).choices[0]
    assert (ended.finish_reason, ended.message.content) == ("stop", "")
    assert ended.logprobs is not None
    assert ended.logprobs.content == [], "the end is no part of the message"


STREAMED = {"seed": 8, "max_tokens": 20, "n": 2, "temperature": 2}


@pytest.mark.parametrize("asked", [{}, {"logprobs": True, "top_logprobs": 2}], ids=["no logprobs", "logprobs"])
def test_a_stream_is_the_answer_in_pieces(openai: OpenAI, asked: dict[str, Any]) -> None:
    whole = chat(openai, **STREAMED, **asked)
    chunks: Any = list(chat(openai, stream=True, **STREAMED, **asked))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    for index, wanted in enumerate(whole.choices):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(choice.delta.content or "" for choice in own) == wanted.message.content
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + [wanted.finish_reason]
        scored = [choice.logprobs.content for choice in own if choice.logprobs is not None]
        assert list(chain(*scored)) == ((wanted.logprobs.content or []) if wanted.logprobs else [])


def test_the_clients_own_accumulator_makes_the_same_of_a_stream(openai: OpenAI) -> None:
    whole = chat(openai, **STREAMED, logprobs=True)
    options = {"include_usage": True}
    with openai.chat.completions.stream(
        model="tiny", messages=HELLO, stream_options=options, logprobs=True, **STREAMED
    ) as stream:
        stream.until_done()
        summed = stream.current_completion_snapshot
    assert [choice.message.content for choice in summed.choices] == texts(whole)
    assert [choice.finish_reason for choice in summed.choices] == [choice.finish_reason for choice in whole.choices]
    assert summed.usage == whole.usage
    assert [choice.logprobs for choice in summed.choices] == [choice.logprobs for choice in whole.choices]


def test_a_stream_ends_with_done(server: ServerProcess) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body)
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)


async def test_the_async_client_does_the_same(server: ServerProcess, openai: OpenAI) -> None:
    async with AsyncOpenAI(base_url=server.url + "/openai/v1", api_key="none", max_retries=0) as client:
        again = await client.chat.completions.create(model="tiny", messages=HELLO, seed=8, max_tokens=20)
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(
                model="tiny", messages=HELLO, seed=8, max_tokens=20, stream=True
            )
        ]
    assert texts(again) == texts(chat(openai, seed=8, max_tokens=20)) == ["".join(pieces)]


TEXT = {"type": "text", "text": "a"}


def message(**fields: Any) -> list[Any]:
    return [HELLO[0] | fields]


REFUSED: list[tuple[str, Any, str]] = [  # field, value, what the message says of it
    ("messages", [], "messages must be a list of messages, not empty"),
    ("messages", "hello", "messages must be a list"),
    ("messages", ["hello"], "messages[0] must be a JSON object"),
    ("messages", [{"role": "user"}], "messages[0] lacks content"),
    ("messages", [{"content": "hello"}], "messages[0] lacks role"),
    ("messages", message(role="tool"), "messages[0].role must be 'developer', 'system', 'user' or 'assistant'"),
    ("messages", message(content=None), "messages[0] lacks content"),
    ("messages", message(content=5), "messages[0].content must be a string or a list of text parts, not empty, got 5"),
    ("messages", message(content=[]), "messages[0].content must be a string or a list of text parts, not empty"),
    ("messages", message(content=["hello"]), "messages[0].content[0] must be a JSON object"),
    ("messages", message(content=[TEXT, {"type": "text"}]), "messages[0].content[1] lacks text"),
    ("messages", message(content=[TEXT, {"type": "image_url"}]), "messages[0].content[1].type must be 'text', got"),
    ("messages", message(content=[TEXT] * 1025), "messages[0].content must have at most 1024 parts, got 1025"),
    ("messages", message(name=5), "messages[0].name must be a valid string"),
    ("messages", message(name="n" * 65), "messages[0].name must have at most 64 characters"),
    ("messages", message(tool_calls=[]), "messages[0]: unknown field"),
    ("messages", HELLO * 1025, "at most 1024, got 1025"),
    ("messages", message(content="the " * 200), "tokens and must leave room for one more in the context of 128"),
    ("messages", message(content="x" * 9999), "cannot fit the context of 128"),
    ("messages", message(role="assistant"), "the chat template refuses them: the user begins"),
    ("prompt", "hello", "unknown field"),
    ("max_completion_tokens", 0, "greater than or equal to 1"),
    ("max_completion_tokens", 128, "max_completion_tokens must be at most"),
    ("max_tokens", 128, "max_tokens must be at most"),
    ("min_new_tokens", 128, "min_new_tokens must be at most max_completion_tokens"),
    ("max_tokens", 0, "greater than or equal to 1"),
    ("max_new_tokens", 5, "here it is max_completion_tokens"),
    ("details", True, "here it is logprobs"),
    ("logprobs", 3, "valid boolean"),
    ("top_logprobs", 3, "needs logprobs: true"),
    ("top_logprobs", 21, "less than or equal to 20"),
    ("temperature", 2.1, "less than or equal to 2"),
    ("n", 17, "less than or equal to 16"),
    ("stop", [""], "at least 1 character"),
    ("stream_options", {"include_usage": True}, "needs stream: true"),
    ("tools", [], "the model writes text alone"),
    ("functions", [], "the model writes text alone"),
    ("audio", {}, "the model writes text alone"),
    ("response_format", {"type": "json_object"}, "must be 'text'"),
    ("return_full_text", True, "the assistant's message alone"),
    ("best_of", 2, "unknown field"),
    ("echo", True, "unknown field"),
    ("user", "u" * 257, "at most 256"),
]


@pytest.mark.parametrize(("field", "value", "said"), REFUSED, ids=lambda part: str(part)[:30])
def test_a_wrong_value_is_a_bad_request_that_names_the_field(
    server: ServerProcess, field: str, value: Any, said: str
) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "tiny", "messages": HELLO} | {field: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert said in error["message"]


def test_fields_that_contradict_each_other_are_refused(openai: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="mean the same; give one"):
        chat(openai, max_tokens=5, max_completion_tokens=5)
    with pytest.raises(BadRequestError, match="the body lacks messages"):
        openai.post("/chat/completions", cast_to=object, body={"model": "tiny"})


SAY = [ChatMessage("user", "hello")]


def test_a_tokenizer_brings_its_own_template_and_the_flag_goes_before_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "own {{ messages[0].content }}"
    assert ChatTemplate(tokenizer).render(SAY) == "own hello"
    assert ChatTemplate(tokenizer, "given {{ messages[0].role }}").render(SAY) == "given user"
    tokenizer.chat_template = {"tool_use": "tools", "default": "the default"}
    assert ChatTemplate(tokenizer).render(SAY) == "the default"
    tokenizer.chat_template = {"tool_use": "tools"}
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatTemplate(tokenizer).render(SAY)


def test_a_checkpoint_with_a_template_answers_chats(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    with serving(tmp_path / "log", "--model", f"tiny={folder}", "--jobs", "none") as server:
        server.wait_until_ready("tiny")
        with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as openai:
            whole = openai.completions.create(model="tiny", prompt="hello", seed=1, max_tokens=9)
            assert texts(chat(openai, seed=1, max_tokens=9)) == [whole.choices[0].text]


BROKEN = {
    "fine\n{% for %}": "line 2: ",
    "{{": "line 1: ",
    "{{ messages | nothing }}": "line 1: No filter named 'nothing'",
    "{{ messages[0].content + 1 }}": "TypeError: ",
    "{% for tool in tools %}{% endfor %}": "TypeError: ",
    "{% include 'x' %}": "TypeError: ",
    "{% break %}": "SyntaxError: ",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_template_is_refused_as_a_flag_and_left_out_as_the_tokenizers(
    source: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The flag's is what somebody just wrote; a checkpoint still completes texts without its own."""
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigurationError, match=re.escape(f"--chat-template is broken: {BROKEN[source]}")):
        ChatTemplate(tokenizer, source)
    tokenizer.chat_template = source
    with caplog.at_level(logging.WARNING):
        template = ChatTemplate(tokenizer)
    assert f"the tokenizer's chat template is broken: {BROKEN[source]}" in caplog.text
    with pytest.raises(InvalidRequest, match="no chat template"):
        template.render(SAY)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ if messages[0].content == 'now' }}",
        "{{ 1 / (messages[0].content == 'hello') }}",
        "{{ range(10000000) | list if messages[0].content == 'now' }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() if messages[0].content == 'now' }}",
        "{{ messages[1].content if messages[0].content == 'now' }}{{ raise_exception('x') }}",
    ],
    ids=["out of the sandbox", "division", "much", "without end", "undefined"],
)
def test_a_template_that_fails_over_some_messages_refuses_them(source: str) -> None:
    template = ChatTemplate(byte_tokenizer(), source)
    with pytest.raises(InvalidRequest, match=r"the chat template refuses them: .+"):
        template.render([ChatMessage("user", "now")])


def test_a_file_that_is_no_template_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    for raw, said in ((b"\xff", "is no UTF-8"), (b"", "is empty"), (b"\xef\xbb\xbf \n", "is empty")):
        file.write_bytes(raw)
        with pytest.raises(ConfigurationError, match=said):
            read_template(str(file))
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        read_template(str(tmp_path))
    file.write_bytes(b"\xef\xbb\xbf{{ messages }}")
    assert read_template(str(file)) == "{{ messages }}"


@pytest.mark.parametrize("text", [None, "{{"], ids=["not there", "broken"])
def test_a_server_does_not_start_without_the_template_it_was_given(
    tmp_path: Path, checkpoint: Path, text: str | None
) -> None:
    file = tmp_path / "chat.jinja"
    if text is not None:
        file.write_text(text)
    flags = ["--model", f"tiny={checkpoint}", "--jobs", "none", "--chat-template", str(file)]
    with serving(tmp_path / "log", *flags) as server:
        assert server.wait() == 1
    log = (tmp_path / "log").read_text()
    said = "is broken: line 1: " if text else f"{file} cannot be read: No such file or directory"
    assert f"error: --chat-template {said}" in log
    assert "Traceback" not in log
