"""docs/protocols.md: each row of its table names tests, and they exist."""

from __future__ import annotations

import re

from tests.conftest import ROOT

ROWS = [line for line in (ROOT / "docs" / "protocols.md").read_text().splitlines() if line.startswith("| ")][1:]


def test_each_row_names_a_test() -> None:
    sections = [row for row in ROWS if row.startswith("| **") and row.split("|")[2].strip() == ""]
    assert len(ROWS) - len(sections) > 30
    for row in ROWS:
        assert row.count("`test_") >= 1 or row in sections, row


def test_the_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "protocols.md").read_text())
    assert named
    for file, function in named:
        source = (ROOT / "tests" / file).read_text()
        assert not function or re.search(rf"^(async )?def {function}\(", source, re.MULTILINE), f"{file}::{function}"
