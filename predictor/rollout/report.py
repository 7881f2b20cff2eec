"""What `rollout status` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from predictor.rollout.decide import Decision, checks
from predictor.rollout.evidence import Evidence
from predictor.rollout.rules import Rules
from predictor.rollout.service import Service, State


def told(
    service: Service, state: State | None, evidence: Evidence | None, decision: Decision | None, rules: Rules
) -> Group:
    """The service's traffic, the rollout and its history, the evidence and what follows from it."""
    return Group(*_parts(service, state, evidence, decision, rules))


def _parts(
    service: Service, state: State | None, evidence: Evidence | None, decision: Decision | None, rules: Rules
) -> Iterator[RenderableType]:
    traffic = ", ".join(f"{revision} {percent}%" for revision, percent in service.traffic) or "none yet"
    facts = {"image": service.image, "traffic": traffic}
    if state is not None:
        facts |= {
            "rollout": f"{state.phase}, {state.percent}% since {state.since:%Y-%m-%d %H:%M:%S} UTC",
            "stable": f"{state.stable_image} ({state.stable_revision})",
            "canary": f"{state.image} ({state.canary_revision or 'not ready yet'})",
        }
    yield _table(facts.items())
    if state is None:
        yield "No rollout was ever started."
        return
    yield ""
    yield _table((f"{entry.time:%H:%M:%S}", f"{entry.percent}%", entry.message) for entry in state.history)
    if evidence is not None:
        yield ""
        yield _compared(evidence, rules)
    if decision is not None:
        yield ""
        yield f"A watcher would now {decision.action}: {decision.message}"


def _table(rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _compared(evidence: Evidence, rules: Rules) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("bad answers", "canary", "stable", "margin"):
        table.add_column(heading, justify="left" if heading == "bad answers" else "right")
    for check in checks(evidence, rules):
        table.add_row(check.name, str(check.canary), str(check.stable), f"{check.margin:.0%}")
    return table
