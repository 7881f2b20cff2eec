"""Measure decode on a GPU, against the memory's limit and the targets: tokens per second by batch and context.

    python -m predictor.model.cuda.build --architectures 90
    python -m benchmarks.gpu --shape gpt2-xl --shape gpt2

Random weights and random keys and values of the true shape: neither changes the time a step takes. Every figure is the
median over rounds, in which all batches and contexts take turns. Needs torch, numpy, typer and rich; docs/gpu.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import predictor.model.kernels
from predictor.model.config import GPT2Config, parse_config
from predictor.model.cuda.attention import DecodeAttention
from predictor.model.cuda.graphs import DecodeRow, DecodeSteps, Launched
from predictor.model.cuda.sampling import Draw
from predictor.model.gpt2 import GPT2, Rows, Span

DEVICE = torch.device("cuda")
SHAPES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}
CONTEXT = 1024
# The server's default parameters.
SAMPLED = {"temperature": 0.7, "top_k": 50}


@dataclass(frozen=True, slots=True)
class Target:
    """Tokens per second that a GPU shall reach."""

    gpu: str  # part of its name
    shape: str
    batch: int
    context: int
    tokens_per_s: float


# Of FP16; the bound is 289 on V100 and 1,382 on H200 at batch 1 and no context.
TARGETS = [
    Target("V100", "gpt2-xl", 1, 128, 200),
    Target("V100", "gpt2-xl", 32, 300, 3_000),
    Target("H200", "gpt2-xl", 1, 128, 770),
    Target("H200", "gpt2-xl", 256, 300, 25_000),
]


def new_model(shape: str, dtype: torch.dtype) -> GPT2:
    layers, width, heads = SHAPES[shape]
    config = parse_config(
        {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": CONTEXT, "vocab_size": 50257}
    )
    return GPT2(config, lambda name, size: torch.randn(size, device=DEVICE) * 0.02, dtype, DEVICE)


def copy_bytes_per_s() -> float:
    """The memory's speed: a copy within the device, counting what is read and what is written."""
    source = torch.ones(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_s(lambda: target.copy_(source), 20)


def median_s(work: Callable[[], object], rounds: int) -> float:
    """Seconds on the device, by its own clock."""
    times: list[float] = []
    for _ in range(rounds + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


class Bench:
    """One model, its KV memory filled with random numbers, and what can be timed on it."""

    def __init__(self, shape: str, dtype: torch.dtype, most_rows: int) -> None:
        began = time.perf_counter()
        self.model = new_model(shape, dtype)
        if self.model.kernels is None:
            raise SystemExit("the kernels are not built: run python -m predictor.model.cuda.build")
        self.config: GPT2Config = self.model.config
        per_token = self.config.kv_bytes_per_token(dtype.itemsize)
        free, _ = torch.cuda.mem_get_info()
        self.rows = min(most_rows, int(free * 0.8) // (per_token * CONTEXT))
        self.kv = self.model.new_kv(self.rows * CONTEXT + 1)
        for layer in self.kv:  # fewer than 2^31 numbers at a time
            layer.normal_()
        loaded = time.perf_counter()
        self.steps = DecodeSteps(
            self.model, self.model.kernels, self.kv, most_rows=self.rows, scratch_slot=self.rows * CONTEXT
        )
        torch.cuda.synchronize()
        self.load_s, self.capture_s = loaded - began, time.perf_counter() - loaded
        self.weight_bytes = self.config.parameters * dtype.itemsize
        self.kv_bytes_per_token = per_token

    def decode(self, batch: int, context: int, steps: int, draw: dict[str, Any], chained: bool = True) -> float:
        """Tokens per second of `steps` steps around a context, the host's work and its reading of tokens included."""
        first = context - steps // 2

        def launch(i: int) -> Launched:
            source = i > 0 and chained
            rows = [
                DecodeRow(17, first + i, CONTEXT * row, Draw(seed=row, count=i, **draw), row if source else None)
                for row in range(batch)
            ]
            return self.steps.launch(rows)

        launch(0).result()
        torch.cuda.synchronize()
        began = time.perf_counter()
        before = launch(0)
        for i in range(1, steps):
            if not chained:
                before.result()
            following = launch(i)
            if chained:
                before.result()
            before = following
        before.result()
        return batch * steps / (time.perf_counter() - began)

    def bound(self, batch: int, context: int, bytes_per_s: float) -> float:
        """Tokens per second if a step took no longer than reading the weights and the live KV once."""
        return batch * bytes_per_s / (self.weight_bytes + batch * context * self.kv_bytes_per_token)

    def attention_bytes_per_s(self, batch: int, context: int) -> float:
        """The attention kernel alone, over all layers: bytes of live KV it reads per second."""
        H, D = self.config.heads, self.config.head_width
        first_slots = torch.arange(batch, device=DEVICE) * CONTEXT
        positions = torch.full((batch,), context - 1, device=DEVICE)
        qkv = torch.randn((batch, 3, H, D), device=DEVICE).to(self.model.dtype)
        assert self.model.kernels is not None
        attention = DecodeAttention(
            self.model.kernels, self.kv, first_slots, positions, self.model.attention_scales, CONTEXT, batch
        )
        graph = torch.cuda.CUDAGraph()
        attention(0, qkv)
        with torch.cuda.graph(graph):
            for layer in range(self.config.layers):
                attention(layer, qkv)
        return batch * context * self.kv_bytes_per_token / median_s(graph.replay, 20)

    def eager_tokens_per_s(self, batch: int, context: int, steps: int) -> float:
        """Decode without graphs, each step waited for, greedy."""
        spans = [Span(row, 1, CONTEXT * row, context) for row in range(batch)]
        rows = Rows([17] * batch, spans, list(range(batch)))
        self.model.forward(rows, self.kv).argmax(-1).tolist()
        began = time.perf_counter()
        for _ in range(steps):
            self.model.forward(rows, self.kv).argmax(-1).tolist()
        return batch * steps / (time.perf_counter() - began)

    def prefill_tokens_per_s(self, chunk: int) -> float:
        """A prompt of the full context, chunk by chunk."""

        def prefill() -> None:
            for first in range(0, CONTEXT, chunk):
                size = min(chunk, CONTEXT - first)
                self.model.forward(Rows([17] * size, [Span(0, size, 0, first + size)], [size - 1]), self.kv)

        return CONTEXT / median_s(prefill, 5)


def measure(shape: str, dtype: torch.dtype, batches: list[int], contexts: list[int], rounds: int) -> dict[str, Any]:
    bytes_per_s = copy_bytes_per_s()
    torch.cuda.reset_peak_memory_stats()
    bench = Bench(shape, dtype, max(batches))
    points = [(batch, context) for batch in batches if batch <= bench.rows for context in contexts]
    rates: dict[tuple[int, int, str], list[float]] = {}
    for _ in range(rounds):
        for batch, context in points:
            for name, draw in (("sampled", SAMPLED), ("greedy", {})):
                rate = bench.decode(batch, context, 64, draw)
                rates.setdefault((batch, context, name), []).append(rate)
            rates.setdefault((batch, context, "waiting"), []).append(
                bench.decode(batch, context, 64, SAMPLED, chained=False)
            )
    results = []
    for batch, context in points:
        medians = {
            f"{name}_tokens_per_s": statistics.median(rates[batch, context, name])
            for name in ("sampled", "greedy", "waiting")
        }
        bound = bench.bound(batch, context, bytes_per_s)
        results.append(
            {"batch": batch, "context": context, **medians, "bound_tokens_per_s": bound}
            | {"share_of_bound": medians["sampled_tokens_per_s"] / bound}
            | {"attention_bytes_per_s": bench.attention_bytes_per_s(batch, context)}
        )
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "rows_of_a_product": predictor.model.kernels.DEVICE_ROWS,
        "copy_bytes_per_s": bytes_per_s,
        "capture_s": bench.capture_s,
        "decode": results,
        "eager_tokens_per_s": {str(batch): bench.eager_tokens_per_s(batch, 128, 16) for batch in (1, batches[-1])},
        "prefill_tokens_per_s": bench.prefill_tokens_per_s(128),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "weight_bytes": bench.weight_bytes,
    }


def show(console: Console, gpu: str, result: dict[str, Any]) -> bool:
    """Print the table; whether every target of this GPU and shape is met."""
    title = f"{gpu}, {result['shape']}, {result['dtype']}, products of {result['rows_of_a_product']} rows"
    table = Table(
        "batch", "context", "sampled", "greedy", "waiting for each", "bound", "share", "attention", title=title
    )
    for row in result["decode"]:
        table.add_row(
            str(row["batch"]),
            str(row["context"]),
            *(f"{row[f'{name}_tokens_per_s']:,.0f}" for name in ("sampled", "greedy", "waiting", "bound")),
            f"{row['share_of_bound']:.0%}",
            f"{row['attention_bytes_per_s'] / 1e12:.2f} TB/s",
        )
    console.print(table)
    eager = ", ".join(f"{rate:,.0f} at batch {batch}" for batch, rate in result["eager_tokens_per_s"].items())
    console.print(
        f"copy {result['copy_bytes_per_s'] / 1e12:.2f} TB/s; graphs captured in {result['capture_s']:.1f} s; without "
        f"graphs {eager}; prefill {result['prefill_tokens_per_s']:,.0f} tokens/s"
    )
    met = True
    for target in TARGETS:
        for row in result["decode"]:
            at = (result["shape"], row["batch"], row["context"]) == (target.shape, target.batch, target.context)
            if target.gpu in gpu and at:
                reached = row["sampled_tokens_per_s"] >= target.tokens_per_s
                met = met and reached
                console.print(
                    f"{'met' if reached else 'NOT met'}: {target.tokens_per_s:,.0f} tokens/s at batch {target.batch}, "
                    f"context {target.context}"
                )
    return met


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SHAPES)}; repeat for several.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    batch: Annotated[list[int] | None, typer.Option(help="Sequences together; repeat for several.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens that each attends to; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each figure is taken.")] = 5,
    product_rows: Annotated[
        list[int] | None, typer.Option(help="Rows of each matrix product; repeat to compare.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Default: results/gpu-DEVICE.json here.")] = None,
) -> None:
    """Measure, print the tables, write the file; exit 1 where a target of this GPU is not met."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    gpu, console, results, met = torch.cuda.get_device_name(), Console(), [], True
    for each in shape or ["gpt2-xl", "gpt2"]:
        for rows in product_rows or [predictor.model.kernels.DEVICE_ROWS]:
            predictor.model.kernels.DEVICE_ROWS = rows
            result = measure(
                each,
                getattr(torch, dtype),
                sorted(batch or [1, 4, 16, 32, 64, 128, 256]),
                sorted(context or [128, 300, 900]),
                rounds,
            )
            met = show(console, gpu, result) and met
            results.append(result)
            torch.cuda.empty_cache()
    path = json_path or Path(__file__).parent / "results" / f"gpu-{gpu.lower().replace(' ', '-')}.json"
    about = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "results": results}
    path.write_text(json.dumps(about, indent=2) + "\n")
    console.print(f"written: {path}")
    if not met:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
