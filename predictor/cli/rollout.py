"""`predictor rollout`: canary rollouts of an InferenceService, by hand and watched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from predictor.rollout.service import Service
    from predictor.rollout.watch import Rollout

app = typer.Typer(
    help="Canary rollouts of an InferenceService in Knative mode.\n\n"
    "start applies a new image with a share of the traffic; watch compares it with the stable version by what "
    "Prometheus counted and goes on by 10, 25, 50 to 100%, or back to 0. The cluster is that of KUBECONFIG, or the one "
    "this runs in; the rollout's state is an annotation of the service.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Option(help="The InferenceService, and the model's name in its URLs.")]
Namespace = Annotated[str, typer.Option(help="Its namespace.")]
Prometheus = Annotated[str, typer.Option(metavar="URL", help="Prometheus that scrapes the predictors.")]
RulesFile = Annotated[
    Path | None, typer.Option("--rules", metavar="FILE", help="YAML with the rules to decide by; see docs/rollout.md.")
]
Interval = Annotated[float, typer.Option(metavar="S", min=0.1, max=86400, help="Seconds from one look to the next.")]
Follow = Annotated[
    float | None,
    typer.Option("--interval", metavar="S", min=0.1, max=86400, help="Look every S seconds until it has moved."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]

_PROMETHEUS = "http://localhost:9090"


def _rollout(name: str, namespace: str, prometheus: str, rules: Path | None, dry_run: bool = False) -> Rollout:
    # Here, because they bring the Kubernetes client, which takes longer to import than `--help` should.
    from predictor.rollout.cluster import Cluster
    from predictor.rollout.prometheus import Metrics
    from predictor.rollout.rules import load_rules
    from predictor.rollout.watch import Rollout

    known = load_rules(rules)
    return Rollout(Cluster(name, namespace), Metrics(prometheus, namespace, known), known, _tell, dry_run=dry_run)


def _tell(line: str) -> None:
    print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), " ".join(line.split()), flush=True)


@app.command()
def start(
    image: Annotated[str, typer.Option(metavar="REPO:TAG", help="The new version.")],
    percent: Annotated[
        int | None,
        typer.Option(min=1, max=99, help="Its first share of the traffic.  [default: the rules' first step]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME=SOURCE", help="Other weights, with the same image or another: the new --model."),
    ] = None,
    name: Name = "aitextgen",
    namespace: Namespace = "default",
    prometheus: Prometheus = _PROMETHEUS,
    interval: Interval = 10,
    rules: RulesFile = None,
    and_watch: Annotated[bool, typer.Option("--watch", help="Then go on as `watch`, with the flags of it.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Apply a new image and its share of the traffic, in one patch.

    The rules are read and Prometheus is asked first, so that what would stop a watcher is known now.
    """
    rollout = _rollout(name, namespace, prometheus, rules, dry_run)
    rollout.start(image, percent, model, interval)
    if and_watch and not dry_run:
        _watch(rollout, interval, forever=False)


@app.command()
def status(
    name: Name = "aitextgen",
    namespace: Namespace = "default",
    prometheus: Prometheus = _PROMETHEUS,
    interval: Annotated[
        float | None, typer.Option(metavar="S", min=0.1, max=86400, help="Look again every S seconds, until Ctrl-C.")
    ] = None,
    rules: RulesFile = None,
) -> None:
    """Show the traffic, the rollout, its history, and what a watcher would do now."""
    from predictor.rollout.cluster import ClusterError

    rollout = _rollout(name, namespace, prometheus, rules)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    while True:
        try:
            console.print(rollout.report())
        except ClusterError as error:
            if interval is None:
                raise
            _tell(str(error))
        if interval is None:
            return
        time.sleep(interval)
        console.print()


@app.command()
def promote(
    name: Name = "aitextgen",
    namespace: Namespace = "default",
    prometheus: Prometheus = _PROMETHEUS,
    interval: Follow = None,
    rules: RulesFile = None,
    dry_run: DryRun = False,
) -> None:
    """Give the canary all the traffic, and say what a watcher would have done."""
    rollout = _rollout(name, namespace, prometheus, rules, dry_run)
    before = rollout.promote()
    _tell_outcome(rollout, before, before.newest_revision, None if dry_run else interval)


@app.command()
def abort(
    name: Name = "aitextgen",
    namespace: Namespace = "default",
    prometheus: Prometheus = _PROMETHEUS,
    interval: Follow = None,
    rules: RulesFile = None,
    dry_run: DryRun = False,
) -> None:
    """Give the stable version all the traffic, and say what a watcher would have done."""
    rollout = _rollout(name, namespace, prometheus, rules, dry_run)
    before = rollout.abort()
    _tell_outcome(rollout, before, before.stable_revision, None if dry_run else interval)


def _tell_outcome(rollout: Rollout, before: Service, revision: str, interval_s: float | None) -> None:
    """What a watcher would have decided, asked only now since Prometheus may take seconds; then the traffic's move."""
    decision = rollout.judge(before).decision
    if decision is not None:
        _tell(f"a watcher would have decided: {decision.action}: {decision.message}")
    if interval_s is not None:
        rollout.follow(revision, interval_s)


@app.command()
def watch(
    name: Name = "aitextgen",
    namespace: Namespace = "default",
    prometheus: Prometheus = _PROMETHEUS,
    interval: Interval = 10,
    rules: RulesFile = None,
    forever: Annotated[
        bool, typer.Option("--forever", help="Go on with the next rollout, as a controller in the cluster does.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Decide at every interval: hold, step up, promote, or roll back.

    Without --forever it ends with the rollout: exit code 0 after a promotion, 1 after anything else.
    """
    _watch(_rollout(name, namespace, prometheus, rules, dry_run), interval, forever=forever)


def _watch(rollout: Rollout, interval_s: float, *, forever: bool) -> None:
    if rollout.watch(interval_s, forever=forever).phase != "promoted":
        raise typer.Exit(1)
