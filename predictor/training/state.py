"""What an interrupted run leaves behind: its state and its best weights, each written whole or not at all.

They live in `out/training/` and go away when the run is finished. Must not know how a step is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from predictor.errors import CheckpointError, ConfigurationError

FOLDER = "training"
STATE = "state.pt"
BEST = "best.safetensors"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of the loss curve; losses in nats per token."""

    step: int
    learning_rate: float
    train_loss: float | None  # the mean since the row before, with dropout; None before the first step
    validation_loss: float


@dataclass(slots=True)
class Progress:
    """Where a run is: `history` has a row per evaluation, and the state is saved at the last row's step."""

    history: list[Measurement]

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.history[-1].step if self.history else 0

    @property
    def best(self) -> Measurement:
        """The row of the lowest validation loss, the earliest of equals."""
        return min(self.history, key=lambda row: row.validation_loss)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary name, then rename: who reads `path` sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_state(
    folder: Path,
    identity: dict[str, str],
    progress: Progress,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write all that the next step depends on; `identity` says which run this is."""
    state = {
        "identity": identity,
        "history": [asdict(row) for row in progress.history],
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_atomically(folder / STATE, lambda path: torch.save(state, path))


def load_state(
    folder: Path, identity: dict[str, str], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Fill model and optimizer in place from the state of the same run.

    Raises ConfigurationError when the state is of another run (naming the first field that differs) and
    CheckpointError when it cannot be read.
    """
    path = folder / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved: dict[str, str] = state["identity"]
        for name, value in identity.items():
            if saved[name] != value:
                raise ConfigurationError(
                    f"resume: {name} was {saved[name]} in the interrupted run and is {value} now; "
                    f"run with the same options, or delete {folder}"
                )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return Progress([Measurement(**row) for row in state["history"]])
    except ConfigurationError:
        raise
    except Exception as error:  # torch.load and load_state_dict raise a dozen types for a damaged file
        raise CheckpointError(f"resume: {path} is not a readable training state; delete {folder}") from error


def save_best(folder: Path, model: torch.nn.Module) -> None:
    """Keep the weights of now; tied ones once."""
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    write_atomically(folder / BEST, lambda path: save_file(weights, path))


def load_best(folder: Path, model: torch.nn.Module) -> None:
    """Put the kept weights back in place."""
    weights = load_file(folder / BEST)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
