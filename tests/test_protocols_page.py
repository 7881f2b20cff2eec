"""docs/protocols.md: each row of its table names tests, and they exist."""

from __future__ import annotations

import re

import httpx

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "protocols.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]

TABLE = "\n".join(ROWS)


def test_each_row_names_a_test() -> None:
    sections = [row for row in ROWS if row.startswith("| **") and row.split("|")[2].strip() == ""]
    assert len(ROWS) - len(sections) > 30
    for row in ROWS:
        assert row.count("`test_") >= 1 or row in sections, row


def test_the_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGE)
    assert named
    for file, function in named:
        source = (ROOT / "tests" / file).read_text()
        assert not function or re.search(rf"^(async )?def {function}\(", source, re.MULTILINE), f"{file}::{function}"


async def test_every_route_is_in_the_table(client: httpx.AsyncClient) -> None:
    # What a path means whichever model and version it names; those of versions and labels stand beside the first.
    names = {"{name}": "NAME", "{id}": "ID", "{version}": "N", "{label}": "L"}
    for path in (await client.get("/openapi.json")).json()["paths"]:
        told = re.sub(r"{\w+}", lambda found: names[found[0]], path)
        # After a whole path the table gives others by their ends: `/v1/models/NAME/versions/N`, `/labels/L`.
        short = re.sub(r"/(versions/N|labels/L)(?=[:/])", "", told)
        ends = [short[place:] for place, character in enumerate(short) if character in "/:"]
        assert any(f"{end}`" in TABLE for end in (told, *ends)), told
