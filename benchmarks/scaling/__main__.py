"""The command line; see `--help`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks.scaling import report
from benchmarks.scaling.capacity import BANDWIDTH_SHARE, GPUS, PRICES_DATED, REFERENCE, Mix
from benchmarks.scaling.measure import as_json, compare
from benchmarks.scaling.scenarios import Scenario, System, delayed, on_cpu, on_v100, scenarios, summarise, variants
from benchmarks.scaling.service import from_json
from benchmarks.scaling.simulation import Outcome

RESULTS = Path(__file__).resolve().parents[1] / "results"
SERVER_FILE = RESULTS / "scaling-server.json"
SERIES_EVERY_S = 10

cli = typer.Typer(
    help="How many replicas, how many requests at once in each, and what a token costs (docs/scaling.md).\n\n"
    "`tables` is arithmetic, `simulate` runs arrivals through Knative's rules to replicas, `measure` puts the real "
    "server beside the simulation. Nothing here needs a GPU or a cluster, and nothing was measured on either.",
    no_args_is_help=True,
    add_completion=False,
)


@cli.command()
def tables(
    price: Annotated[
        list[str] | None, typer.Option(help=f"NAME=USD per hour, such as V100-16=2.5; else assumed ({PRICES_DATED}).")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the mean prompt.")] = int(REFERENCE.prompt),
    new: Annotated[int, typer.Option(min=1, help="New tokens of the mean request.")] = int(REFERENCE.new),
    bandwidth_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Of the memory's bandwidth that decoding reaches.")
    ] = BANDWIDTH_SHARE,
) -> None:
    """Print concurrency, speed and cost by GPU as Markdown: GPT-2 XL in FP16, computed."""
    prices = dict(_price(each) for each in price or [])
    gpus = [replace(gpu, usd_per_hour=prices.get(gpu.name, gpu.usd_per_hour)) for gpu in GPUS]
    mix = Mix(prompt, new)
    print(f"{report.concurrency(gpus, mix)}\n\n{report.speed(gpus, mix, bandwidth_share)}\n")
    print(f"{gpus[0].name}, replicas in the long run:\n\n{report.replicas(gpus[0], mix)}\n")
    print(f"USD per million new tokens:\n\n{report.cost(gpus, mix, bandwidth_share)}")


def _price(text: str) -> tuple[str, float]:
    name, _, usd = text.partition("=")
    known = [gpu.name for gpu in GPUS]
    if name not in known:
        raise typer.BadParameter(f"wanted NAME=USD with one of {', '.join(known)}; got {text!r}")
    try:
        return name, float(usd)
    except ValueError:
        raise typer.BadParameter(f"wanted a number of USD after {name}=; got {usd!r}") from None


@cli.command()
def simulate(
    server: Annotated[
        Path, typer.Option(help="The measured service curve, as `measure` writes it.", exists=True, dir_okay=False)
    ] = SERVER_FILE,
    seed: Annotated[int, typer.Option(help="The same seed, the same arrivals.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of scaling.json and scaling-*.png.", file_okay=False)] = RESULTS,
) -> None:
    """A burst, a ramp and a scale from zero, by a measured and a computed service curve; and what each number changes.

    Half a minute.
    """
    measured: dict[str, Any] = json.loads(server.read_text())
    systems = [on_cpu(from_json(measured["curve"]), measured["new_tokens"], measured["ready_s"]), on_v100()]
    pictures = [*zip(*map(scenarios, systems), strict=True), delayed(systems[0])]
    changed = variants(systems[1])
    with tqdm(total=sum(map(len, pictures)) + len(changed), unit=" scenarios") as bar:

        def run(scenario: Scenario) -> Outcome:
            bar.set_postfix_str(scenario.name)
            outcome = scenario.run(seed)
            bar.update()
            return outcome

        drawn = [[(scenario, run(scenario)) for scenario in columns] for columns in pictures]
        summaries = {name: summarise(run(scenario)) for name, scenario in changed}

    from benchmarks.scaling.plot import plot  # here, because it takes a second and needs matplotlib

    out.mkdir(parents=True, exist_ok=True)
    for columns in drawn:
        plot(columns, out / f"scaling-{columns[0][0].name}.png")
    written = {
        "seed": seed,
        "systems": [_described(system) for system in systems],
        "scenarios": [_told(scenario, outcome) for columns in drawn for scenario, outcome in columns],
        "variants": summaries,
    }
    (out / "scaling.json").write_text(json.dumps(_rounded(written), indent=1) + "\n")
    print(report.changes(summaries))


@cli.command()
def measure(
    model: Annotated[Path, typer.Option(help="A checkpoint folder.", exists=True, file_okay=False)],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or int8.")] = "int8",
    threads: Annotated[int, typer.Option(min=1, help="Of the server; the client wants a core of its own.")] = 1,
    seconds: Annotated[float, typer.Option(min=1, help="Of arrivals per rate and round.")] = 12,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Where the figures go.", dir_okay=False)] = SERVER_FILE,
) -> None:
    """Measure the server's service curve, send it requests by chance, and simulate the same arrivals.

    At 30, 60 and 80% of its capacity; two minutes on a machine left alone. Runs that others disturb are repeated.
    """
    curve, compared, facts = compare(model, dtype, threads, (0.3, 0.6, 0.8), seconds, rounds)
    written = as_json(curve, compared, facts)
    out.write_text(json.dumps(_rounded(written), indent=1) + "\n")
    print(report.compared(written))


def _described(system: System) -> dict[str, Any]:
    return {"name": system.name, "capacity": system.capacity, "tokens": system.tokens} | {
        "curve": asdict(system.curve),
        "deployment": asdict(system.deployment),
    }


def _told(scenario: Scenario, outcome: Outcome) -> dict[str, Any]:
    every = outcome.moments[SERIES_EVERY_S - 1 :: SERIES_EVERY_S]
    return {
        "scenario": scenario.name,
        "system": scenario.system.name,
        "load": scenario.load.points,
        "summary": summarise(outcome),
        "seconds": [moment.at_s for moment in every],
        "desired": [moment.desired for moment in every],
        "ready": [moment.ready for moment in every],
        "running": [moment.running for moment in every],
        "waiting": [moment.waiting for moment in every],
    }


def _rounded(value: Any) -> Any:
    """Six digits: more would differ between machines and say nothing."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    cli()
