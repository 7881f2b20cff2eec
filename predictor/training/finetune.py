"""One training run from options to a finished folder: the loop, and what it reports.

A step depends on the weights, the optimizer and (seed, step) alone: a resumed run equals the uninterrupted one.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from predictor.errors import ConfigurationError
from predictor.training import curve, folder, state
from predictor.training.data import training_batch
from predictor.training.optimizer import learning_rate, make_optimizer
from predictor.training.options import FinetuneOptions, check_options
from predictor.training.trainee import Trainee, choose_device, prepare

__all__ = ["FinetuneOptions", "FinetuneReport", "finetune"]


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """What a run came to. The loss is of the saved weights, in their saved dtype, computed in fp32."""

    out: Path
    steps: int
    best_step: int
    validation_loss: float  # nats per token
    bits_per_byte: float  # of the validation text in UTF-8
    parameters: int
    train_tokens: int
    validation_tokens: int
    validation_bytes: int
    duration_s: float  # of this call, a resumed run's earlier calls not counted
    device: str
    precision: str


def finetune(options: FinetuneOptions, show_progress: bool = True) -> FinetuneReport:
    """Train; leave the checkpoint of the lowest validation loss, loss.csv and loss.png in `options.out`.

    Same options, machine and thread count: same weights, interrupted or not. While it runs, `out/training/`
    holds what `resume` needs. Raises InvalidRequest, ConfigurationError or CheckpointError before the first
    step, and ConfigurationError when the loss stops being a number.
    """
    started_s = time.monotonic()
    check_options(options)
    curve.require_matplotlib()
    device = choose_device(options)
    workspace = options.out / state.FOLDER
    _check_out(options, workspace)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        trainee = prepare(options, device)
        _make_workspace(workspace)
        progress = _train(options, trainee, workspace, show_progress)
        loss = _finish(options, trainee, workspace, progress)
    data = trainee.data
    return FinetuneReport(
        out=options.out,
        steps=options.steps,
        best_step=progress.best.step,
        validation_loss=loss,
        bits_per_byte=loss / math.log(2) * data.validation.numel() / data.validation_bytes,
        parameters=sum(parameter.numel() for parameter in trainee.model.parameters()),
        train_tokens=data.train.numel(),
        validation_tokens=data.validation.numel(),
        validation_bytes=data.validation_bytes,
        duration_s=time.monotonic() - started_s,
        device=device.type,
        precision=str(trainee.precision).removeprefix("torch."),
    )


def _check_out(options: FinetuneOptions, workspace: Path) -> None:
    """Raise ConfigurationError rather than lose a model or an interrupted run."""
    if (options.out / "config.json").exists():
        raise ConfigurationError(f"out: {options.out} already holds a model; choose another folder or delete it")
    if (workspace / state.STATE).exists() and not options.resume:
        raise ConfigurationError(
            f"out: {options.out} holds an interrupted run; go on with resume, or delete {workspace}"
        )


def _make_workspace(workspace: Path) -> None:
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"out: cannot make {workspace}: {error.strerror}") from error


def _train(options: FinetuneOptions, trainee: Trainee, workspace: Path, show_progress: bool) -> state.Progress:
    optimizer = make_optimizer(trainee.model, options.weight_decay)
    identity = _identity(options, trainee)
    progress = state.Progress([])
    # resume without a state starts at the beginning: a job that may be restarted can always pass it
    if (workspace / state.STATE).exists():
        progress = state.load_state(workspace, identity, trainee.model, optimizer)

    def evaluate(step: int, rate: float, train_loss: float | None) -> None:
        loss = trainee.validation_loss(options.batch_size, trainee.precision)
        progress.history.append(state.Measurement(step, rate, train_loss, loss))
        if progress.best.step == step:
            state.save_best(workspace, trainee.model)
        state.save_state(workspace, identity, progress, trainee.model, optimizer)
        curve.write_table(progress.history, options.out / "loss.csv")

    if not progress.history:
        evaluate(0, 0.0, None)
    losses: list[float] = []
    first = progress.step
    with tqdm(total=options.steps, initial=first, desc="finetune", unit="step", disable=not show_progress) as bar:
        for step in range(first, options.steps):
            rate = learning_rate(step, options.steps, options.warmup, options.peak_learning_rate)
            loss = _step(options, trainee, optimizer, step, rate)
            if not math.isfinite(loss):
                raise ConfigurationError(
                    f"learning_rate: the loss is {loss} at step {step:,}; the peak must be lower than "
                    f"{options.peak_learning_rate:.3g} for this run"
                )
            losses.append(loss)
            if (step + 1) % options.evaluate_every == 0 or step + 1 == options.steps:
                evaluate(step + 1, rate, sum(losses) / len(losses))
                losses.clear()
            validation = progress.history[-1].validation_loss
            bar.set_postfix(loss=f"{loss:.3f}", validation=f"{validation:.3f}", refresh=False)
            bar.update()
    return progress


def _identity(options: FinetuneOptions, trainee: Trainee) -> dict[str, str]:
    """All that must be equal for a resumed run to be the same run; the data by content and not by path."""
    besides = ("data", "out", "resume")
    identity = {name: str(value) for name, value in asdict(options).items() if name not in besides}
    identity["device"] = trainee.device.type
    identity["precision"] = str(trainee.precision).removeprefix("torch.")
    identity["data"] = trainee.data.fingerprint()  # last: another vocabulary or init is named before it
    return identity


def _step(
    options: FinetuneOptions, trainee: Trainee, optimizer: torch.optim.Optimizer, step: int, rate: float
) -> float:
    """One optimizer step; returns the loss of its batch, in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    # Dropout draws from torch's generator: seeded anew at each step it needs no saved state.
    entropy = numpy.random.SeedSequence([options.seed, step, 1])
    torch.manual_seed(int(entropy.generate_state(1, numpy.uint64)[0]))
    inputs, targets = training_batch(trainee.data.train, trainee.context, options.batch_size, options.seed, step)
    trainee.model.train(True)
    loss = trainee.loss(inputs, targets, trainee.precision) / targets.numel()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), options.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _finish(options: FinetuneOptions, trainee: Trainee, workspace: Path, progress: state.Progress) -> float:
    """Write the folder from the best weights and clear the workspace; returns the saved model's loss."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    state.load_best(workspace, trainee.model)
    folder.cast_model(trainee.model, dtype)
    folder.cast_model(trainee.model, torch.float32)
    loss = trainee.validation_loss(options.batch_size, torch.float32)
    if not math.isfinite(loss):
        raise ConfigurationError(f"dtype: the trained weights must fit {options.dtype}, and do not")
    curve.write_picture(progress.history, options.out / "loss.png")
    folder.write_folder(trainee.model, trainee.tokenizer, dtype, workspace / "folder", options.out)
    shutil.rmtree(workspace)
    return loss
