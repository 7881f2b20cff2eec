"""One promise over all protocols: the same prompt, seed and parameters give the same text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import ServerProcess, serving

PROMPT = "hello world the"
NEW = 12  # tokens
SAMPLING = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 11}
PARAMETERS = SAMPLING | {"max_new_tokens": NEW, "ignore_eos": True}

Client = httpx.AsyncClient


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("same-text")
    template = folder / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    flags = ["--model", f"tiny={checkpoint}", "--jobs", f"sqlite:///{folder}/jobs.db", "--chat-template", str(template)]
    with serving(folder / "log", *flags) as running:
        running.wait_until_ready("tiny")
        yield running


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[Client]:
    """In place of the in-process one: jobs need a worker."""
    async with Client(base_url=server.url, timeout=60) as opened:
        yield opened


async def post(client: Client, path: str, body: Any, **options: Any) -> Any:
    response = await client.post(path, json=body, **options)
    assert response.status_code == 200, response.text
    return response.json()


async def events(client: Client, path: str, body: Any) -> list[Any]:
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def total_tokens(client: Client) -> int:
    """The prompt's and the new tokens: older bodies limit their sum."""
    told = await post(client, "/v1/models/tiny:predict", {"instances": [PROMPT], "parameters": {"details": True}})
    return int(told["predictions"][0]["prompt_tokens"]) + NEW


async def v1_rows(client: Client) -> str:
    answer = await post(client, "/v1/models/tiny:predict", {"instances": [PROMPT], "parameters": PARAMETERS})
    return str(answer["predictions"][0])


async def v1_columns(client: Client) -> str:
    answer = await post(client, "/v1/models/tiny/versions/1:predict", {"inputs": PROMPT, "parameters": PARAMETERS})
    return str(answer["outputs"])


async def v1_stream(client: Client) -> str:
    body = {"instances": [PROMPT], "parameters": PARAMETERS | {"stream": True}}
    return "".join(event["delta"] for event in await events(client, "/v1/models/tiny:predict", body))


async def v1_text_and_length(client: Client) -> str:
    body = {"text": PROMPT, "length": await total_tokens(client), "ignore_eos": True, "return_full_text": False}
    return str((await post(client, "/v1/models/tiny:predict", body | SAMPLING))["prediction"])


async def v2_infer(client: Client) -> str:
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}
    answer = await post(client, "/v2/models/tiny/infer", {"inputs": [tensor], "parameters": PARAMETERS})
    (output,) = [each for each in answer["outputs"] if each["name"] == "text_output"]
    return str(output["data"][0])


async def v2_generate(client: Client) -> str:
    body = {"text_input": PROMPT, "parameters": PARAMETERS}
    return str((await post(client, "/v2/models/tiny/generate", body))["text_output"])


async def v2_generate_stream(client: Client) -> str:
    body = {"text_input": PROMPT, "parameters": PARAMETERS}
    return "".join(each["text_output"] for each in await events(client, "/v2/models/tiny/generate_stream", body))


OPENAI = {"model": "tiny", "prompt": PROMPT, "max_tokens": NEW, "ignore_eos": True} | SAMPLING


async def openai(client: Client) -> str:
    return str((await post(client, "/v1/completions", OPENAI))["choices"][0]["text"])


async def openai_stream(client: Client) -> str:
    chunks = await events(client, "/openai/v1/completions", OPENAI | {"stream": True})
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


CHAT = {key: value for key, value in OPENAI.items() if key != "prompt"} | {
    "messages": [{"role": "user", "content": PROMPT}]
}


async def chat(client: Client) -> str:
    return str((await post(client, "/v1/chat/completions", CHAT))["choices"][0]["message"]["content"])


async def chat_stream(client: Client) -> str:
    chunks = await events(client, "/openai/v1/chat/completions", CHAT | {"stream": True})
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def finished(client: Client, body: Any) -> Any:
    response = await client.post("/v1/jobs", json=body)
    assert response.status_code == 202, response.text
    for _ in range(500):
        job = (await client.get(response.headers["location"])).json()
        if job["status"] not in ("queued", "running"):
            break
        await asyncio.sleep(0.02)
    assert job["status"] == "succeeded", job
    return job["result"]


async def job_of_rows(client: Client) -> str:
    return str((await finished(client, {"instances": [PROMPT], "parameters": PARAMETERS}))["predictions"][0])


async def job_of_completions(client: Client) -> str:
    return str((await finished(client, OPENAI))["choices"][0]["text"])


async def job_of_chat(client: Client) -> str:
    return str((await finished(client, CHAT))["choices"][0]["message"]["content"])


CLOUD_RUN = {"prefix": PROMPT, "length": NEW, "include_prefix": "false", "ignore_eos": "true"} | SAMPLING


async def cloud_run_post(client: Client) -> str:
    return str((await post(client, "/", CLOUD_RUN))["text"])


async def cloud_run_get(client: Client) -> str:
    return str((await client.get("/", params=CLOUD_RUN)).json()["text"])


async def huggingface_gpt(client: Client) -> str:
    body = {"text": {"plain": PROMPT}, "do_sample": True, "max_length": await total_tokens(client), "ignore_eos": True}
    (sentence,) = (await post(client, "/generate", body | SAMPLING | {"top_p": 90}))["sentences"]
    return str(sentence["generated_text"]).removeprefix(PROMPT)


async def seldon(client: Client) -> str:
    body = {"data": {"ndarray": [PROMPT]}, "meta": {"tags": PARAMETERS}}
    return str((await post(client, "/predict", body))["data"]["ndarray"][0]).removeprefix(PROMPT)


async def nanogpt(client: Client) -> str:
    query = {"model": "tiny", "prompt": PROMPT, "max_tokens": NEW, "ignore_eos": "true"} | SAMPLING
    return str((await post(client, "/completions", None, params=query))["choices"][0]["text"])


OTHERS: list[Callable[[Client], Awaitable[str]]] = [
    v1_columns,
    v1_stream,
    v1_text_and_length,
    v2_infer,
    v2_generate,
    v2_generate_stream,
    openai,
    openai_stream,
    chat,
    chat_stream,
    job_of_rows,
    job_of_completions,
    job_of_chat,
    cloud_run_post,
    cloud_run_get,
    huggingface_gpt,
    seldon,
    nanogpt,
]


@pytest.mark.parametrize("ask", OTHERS, ids=lambda ask: ask.__name__)
async def test_the_text_is_that_of_v1(client: Client, ask: Callable[[Client], Awaitable[str]]) -> None:
    wanted = await v1_rows(client)
    assert len(wanted) > NEW / 2
    assert await ask(client) == wanted
