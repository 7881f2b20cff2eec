"""`predictor parity`: one comparison from options to a report."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from predictor.checkpoints.load import Progress, read_config
from predictor.checkpoints.source import resolve
from predictor.checkpoints.tokenizer import load_tokenizer
from predictor.errors import ConfigurationError
from predictor.evaluation import models, plot
from predictor.evaluation.comparison import Comparison
from predictor.evaluation.options import ParityOptions
from predictor.evaluation.report import Report, as_json
from predictor.evaluation.windows import read_windows
from predictor.model.config import parse_config

T = TypeVar("T")


def parity(options: ParityOptions) -> Report:
    """Compare `options.dtype` with float32 over the windows of the text.

    Both models are in memory together. Raises ConfigurationError or CheckpointError before anything is computed.
    """
    started_s = time.monotonic()
    if options.plot is not None:
        plot.require_matplotlib()
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        _check_writable(flag, path)
    folder, device = resolve(options.model), torch.device(options.device)
    config = parse_config(read_config(folder))
    windows = read_windows(options.text, load_tokenizer(folder, config.vocabulary), config.context, options.windows)
    reference = _open("float32", lambda told: models.open_reference(options.reference, folder, device, told))
    candidate = _open(options.dtype, lambda told: models.open_candidate(folder, options.dtype, device, told))
    comparison = Comparison()
    with torch.inference_mode():
        for ids in tqdm(windows.ids, desc="parity", unit=" windows", file=sys.stderr, disable=None):
            comparison.add(ids, candidate.logits(ids, options.rows), reference.logits(ids, options.rows))
        return Report(
            model=options.model,
            dtype=options.dtype,
            device=options.device,
            reference=options.reference,
            context=config.context,
            windows=len(windows.ids),
            window_tokens=windows.length,
            tokens_left_out=windows.tokens_left_out,
            rows=options.rows,
            duration_s=round(time.monotonic() - started_s, 3),
            measures=comparison.measures(),
            limits=options.limits,
            curves=comparison.curves(),
        )


def write_files(report: Report, options: ParityOptions) -> None:
    """Write the JSON and the plot that were asked for."""
    try:
        if options.json is not None:
            options.json.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
        if options.plot is not None:
            plot.write_plot(report, options.plot)
    except OSError as error:
        raise ConfigurationError(f"cannot write {error.filename}: {error.strerror}") from error


def _check_writable(flag: str, path: Path | None) -> None:
    """Raise ConfigurationError now rather than after the comparison."""
    if path is None:
        return
    target = path if path.exists() else path.parent
    if path.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise ConfigurationError(f"{flag}: cannot write {path}")


def _open(name: str, load: Callable[[Progress], T]) -> T:
    """Load a model behind a bar that goes away."""
    with tqdm(
        desc=f"loading {name}", unit=" parameters", unit_scale=True, leave=False, file=sys.stderr, disable=None
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return load(progress)
