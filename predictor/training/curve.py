"""The loss curve as a table and as a picture. Must not know how it came about."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from predictor.errors import ConfigurationError
from predictor.training.state import Measurement, write_atomically


def require_matplotlib() -> None:
    """Raise ConfigurationError now rather than after hours of training."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "finetune draws its loss curve with matplotlib: pip install gpt2-predictor[train]"
        ) from error


def write_table(history: Sequence[Measurement], path: Path) -> None:
    """Write one CSV line per evaluation; losses in nats per token."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", "learning_rate", "train_loss", "validation_loss"])
            for row in history:
                train_loss = "" if row.train_loss is None else f"{row.train_loss:.5f}"
                writer.writerow([row.step, f"{row.learning_rate:.3g}", train_loss, f"{row.validation_loss:.5f}"])

    write_atomically(path, write)


def write_picture(history: Sequence[Measurement], path: Path) -> None:
    """Draw both losses over the steps as a PNG, the kept checkpoint marked."""
    from matplotlib.figure import Figure

    best = min(history, key=lambda row: row.validation_loss)
    trained = [(row.step, row.train_loss) for row in history if row.train_loss is not None]
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([step for step, _ in trained], [loss for _, loss in trained], label="train (with dropout)")
    axes.plot([row.step for row in history], [row.validation_loss for row in history], label="validation")
    axes.plot([best.step], [best.validation_loss], "o", label=f"kept: {best.validation_loss:.3f} at {best.step:,}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))
