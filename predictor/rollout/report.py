"""What is known of a rollout at one look, and how `rollout status` prints it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table

from predictor.rollout.decide import Decision, checks
from predictor.rollout.evidence import Evidence
from predictor.rollout.rules import Rules
from predictor.rollout.service import Service


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to know, and what follows from it; None where there is nothing to compare or to decide."""

    service: Service
    evidence: Evidence | None = None
    decision: Decision | None = None


def report(look: Look, events: list[tuple[datetime, str]], rules: Rules) -> Group:
    """The service's traffic, the rollout and its history, the evidence and what follows from it."""
    return Group(*_parts(look, events, rules))


def _parts(look: Look, events: list[tuple[datetime, str]], rules: Rules) -> Iterator[RenderableType]:
    service, record = look.service, look.service.record
    facts = {
        "image": service.version.image,
        "traffic": ", ".join(f"{revision} {percent}%" for revision, percent in service.traffic) or "none yet",
    }
    if record is not None:
        facts |= {
            "rollout": f"{service.phase}, at {service.percent}%, begun {record.started:%Y-%m-%d %H:%M:%S} UTC",
            "stable": f"{record.stable.told_beside(record.canary)} ({record.stable_revision})",
            "canary": f"{record.canary.told_beside(record.stable)} ({service.newest_revision})",
        }
    yield _table(facts.items())
    if record is None:
        yield "No rollout is recorded."
    if events:
        yield ""
        yield _table((f"{time:%H:%M:%S}", message) for time, message in events)
    if look.evidence is not None:
        yield ""
        yield _compared(look.evidence, rules)
    if look.decision is not None:
        yield ""
        yield f"A watcher would now {look.decision.action}: {look.decision.message}"


def _table(rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        while len(table.columns) < len(row):
            table.add_column(overflow="fold")
        table.add_row(*row)
    return table


def _compared(evidence: Evidence, rules: Rules) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("bad answers", "canary", "stable", "margin"):
        table.add_column(heading, justify="left" if heading == "bad answers" else "right")
    for check in checks(evidence, rules):
        table.add_row(check.name, str(check.canary), str(check.stable), f"{check.margin:.0%}")
    return table
