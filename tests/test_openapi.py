"""The OpenAPI document: it lists every route, and each of its examples is answered as it says."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def bodies(operation: dict[str, Any]) -> dict[str, Any]:
    """Example bodies by name; one without a body where the route takes none."""
    if "requestBody" not in operation:
        return {"none": None}
    (content,) = operation["requestBody"]["content"].values()
    assert content["examples"], "a route that takes a body shows one"
    return {name: each["value"] for name, each in content["examples"].items()}


async def test_each_example_is_answered_as_the_document_says(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    job = (await client.post("/v1/jobs", json={"instances": ["hello"]})).json()["id"]
    # What removes something comes last.
    for method, path, operation in sorted(operations(document), key=lambda each: each[0] == "DELETE"):
        values, query = {}, {}
        for parameter in operation.get("parameters", []):
            assert "example" in parameter, f"{method} {path}: {parameter['name']} has no example"
            if parameter["in"] == "path":
                values[parameter["name"]] = job if parameter["name"] == "id" else parameter["example"]
            elif parameter["in"] == "query":
                query[parameter["name"]] = parameter["example"]
        wanted = int(next(iter(operation["responses"])))
        for name, body in bodies(operation).items():
            response = await client.request(method, path.format(**values), params=query, json=body)
            assert response.status_code == wanted, f"{method} {path} {name}: {response.text[:300]}"


async def test_every_route_of_ours_is_listed_with_a_summary(client: httpx.AsyncClient, kserve_app: FastAPI) -> None:
    document = (await client.get("/openapi.json")).json()
    listed = {(method, path) for method, path, _ in operations(document)}
    for method, path, operation in operations(document):
        assert operation["summary"], f"{method} {path}"
    ours = {
        (method, route.path_format)
        for route in kserve_app.routes
        if isinstance(route, APIRoute) and route.endpoint.__module__.startswith("predictor.")
        for method in route.methods
    }
    assert len(listed) > 40
    assert ours - listed == {("GET", "/docs"), ("GET", "/docs/{file}")}


async def test_the_document_names_the_model_that_is_served(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    (name,) = document["paths"]["/v1/models/{name}:predict"]["post"]["parameters"]
    assert name["example"] == "tiny"


async def test_the_page_of_the_document_needs_no_other_server(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.status_code == 200
    assert "http://" not in page.text
    assert "https://" not in page.text
    for file, kind in (("swagger-ui-bundle.js", "javascript"), ("swagger-ui.css", "css"), ("favicon-32x32.png", "png")):
        assert f"docs/{file}" in page.text
        response = await client.get(f"/docs/{file}")
        assert response.status_code == 200
        assert kind in response.headers["content-type"]


@pytest.mark.parametrize("path", ["/docs/../../etc/passwd", "/docs/%2e%2e/__init__.py", "/docs/main.py", "/docs/x"])
async def test_only_the_files_of_the_page_are_served(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 404
