"""A predictor with a planted fault: `python -m tests.canary.faulty FAULT -- serve ...`.

Our server, patched in its own process before it serves, so that the fault shows where a bad version's would: in the
answers and in its own metrics.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)


@app.command()
def errors(
    serve: Annotated[list[str], typer.Argument(help="What follows `predictor`, after --.")],
    share: Annotated[float, typer.Option(help="Part of the requests that fail with 500.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 2,
) -> None:
    """Fail some of the requests, as an engine does that has a bug."""

    def plant() -> None:
        from predictor.errors import EngineFailed
        from predictor.server.predictor import Predictor

        chosen = random.Random(seed)
        healthy = Predictor.predict

        async def predict(self: Any, *arguments: Any, **options: Any) -> Any:
            if chosen.random() < share:
                raise EngineFailed("a planted fault")
            return await healthy(self, *arguments, **options)

        Predictor.predict = predict

    run(plant, serve)


@app.command()
def slow(
    serve: Annotated[list[str], typer.Argument(help="What follows `predictor`, after --.")],
    times: Annotated[int, typer.Option(help="How often every step is computed.")] = 4,
) -> None:
    """Compute every step of the engine several times over; the same step gives the same tokens.

    Four times is three times as slow: what is computed again finds its data in the caches. Measured on two cores: 3.1 x
    between tokens, 2.7 x for an answer of 32 tokens. A pause instead would make the step after it twice as slow too.
    """

    def plant() -> None:
        from predictor.engine.runner import Runner

        healthy = Runner.launch

        def launch(self: Any, batch: Any) -> Any:
            for _ in range(times - 1):
                healthy(self, batch)
            return healthy(self, batch)

        Runner.launch = launch  # type: ignore[method-assign]

    run(plant, serve)


@app.command()
def tokens(serve: Annotated[list[str], typer.Argument(help="What follows `predictor`, after --.")]) -> None:
    """Generate other tokens than were drawn, from the same seeds: every text differs, every metric is healthy."""

    def plant() -> None:
        from predictor.engine import runner

        healthy = runner.sample

        def sample(*arguments: Any, **options: Any) -> Any:
            drawn = healthy(*arguments, **options)
            # The neighbour in the vocabulary; 0 is the end token, which must neither come nor go.
            return [each._replace(token_id=each.token_id ^ 1) if (each.token_id or 0) > 1 else each for each in drawn]

        runner.sample = sample

    run(plant, serve)


def run(plant: Callable[[], None], serve: list[str]) -> None:
    """Plant, then be `predictor serve`."""
    sys.argv = ["predictor"]  # KServe parses it when it is imported
    plant()
    sys.argv = ["predictor", *serve]
    from predictor.__main__ import main

    main()


if __name__ == "__main__":
    app()
